"""The metric loss of one peer, built by name from pytorch-metric-learning: loss, miner and reducer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor, nn

from ray_dmml.config.schema import MetricLossConfig
from ray_dmml.errors import UserError
from ray_dmml.losses.distance_weighted import (
    BoundedCosineSimilarity,
    DistanceWeightedNegativeMiner,
    ExactEuclideanDistance,
)
from ray_dmml.losses.rehearsal import refuse_other_sizes, rehearse

_KINDS: dict[str, tuple[Any, type]] = {
    "loss": (losses, losses.BaseMetricLossFunction),
    "miner": (miners, miners.BaseMiner),
    "reducer": (reducers, reducers.BaseReducer),
    "distance": (distances, distances.BaseDistance),
}
_UNSUPPORTED = {
    "DynamicSoftMarginLoss",  # its running state is not in its state_dict
    "HistogramLoss",  # fails on duplicate images
    # Abstract classes, and classes that need other inputs than embeddings and labels:
    *("GenericPairLoss", "ManifoldLoss", "VICRegLoss", "EmbeddingsAlreadyPackagedAsTriplets"),
    *("DoNothingReducer", "MultipleReducers", "BatchedDistance"),
}


class MetricLoss(nn.Module):
    """Computes ``loss(embeddings, labels, miner(embeddings, labels))`` for one peer.

    The module's parameters are those of the loss, such as proxies or class centres. Every L2 distance
    in the loss and the miner is computed by
    :class:`~ray_dmml.losses.distance_weighted.ExactEuclideanDistance`.

    Args:
        config: names and arguments of the parts. The argument ``distance`` of a loss or a miner is a
            mapping: ``{name: CosineSimilarity, args: {...}}``.
        num_classes: number of training classes. A loss that requires it gets it.
        embedding_size: D. A loss that requires it gets it.

    Raises:
        UserError: a name is unknown, a class refuses its arguments, or the parts fail in a rehearsal (see
            :mod:`~ray_dmml.losses.rehearsal`).
    """

    def __init__(self, config: MetricLossConfig, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        # descriptors_dim is P2SGradLoss's name for D.
        sizes = {"num_classes": num_classes, "embedding_size": embedding_size, "descriptors_dim": embedding_size}
        arguments = {}
        if config.reducer is not None:
            arguments["reducer"] = _build("reducer", "loss.metric.reducer", config.reducer)
        self.loss: nn.Module = _build("loss", "loss.metric", config.name, config.args, sizes, **arguments)
        self.miner: nn.Module | None = None
        if config.miner is not None:
            self.miner = _build("miner", "loss.metric.miner", config.miner.name, config.miner.args)
        for module in list(self.modules()):
            old: Any = getattr(module, "distance", None)
            if type(old) is distances.LpDistance and old.p == 2:
                module.distance = ExactEuclideanDistance(normalize_embeddings=old.normalize_embeddings, power=old.power)
            elif isinstance(module, losses.TupletMarginLoss):
                module.distance = BoundedCosineSimilarity()
        refuse_other_sizes(config.args, num_classes, embedding_size)
        try:
            rehearse(self, num_classes, embedding_size)
        except Exception as error:
            names = [config.name, config.miner and config.miner.name, config.reducer]
            parts = " with ".join(name for name in names if name)
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"loss.metric: {parts} does not work with these settings: {reason}") from error

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, D) embeddings of any float dtype and (B,) int64 labels in [0, num_classes) -> a scalar.

        It is computed in float32 (float64 for float64 embeddings), also under autocast. A batch without a
        pair or triplet gives zero with a gradient.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            mined = self.miner(embeddings, labels) if self.miner is not None else None
            return self.loss(embeddings, labels, mined)


def _build(
    kind: str,
    where: str,
    name: str,
    args: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    **arguments: Any,
) -> Any:
    """Builds the library's class of this name. ``sizes`` are passed to a class that requires them."""
    library, base = _KINDS[kind]
    classes = {key: value for key, value in vars(library).items() if inspect.isclass(value) and value is not base}
    known = {key: cls for key, cls in classes.items() if issubclass(cls, base) and key not in _UNSUPPORTED}
    if kind == "miner":
        known["DistanceWeightedNegativeMiner"] = DistanceWeightedNegativeMiner
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
        raise UserError(f"{where}: there is no {kind} {name!r}; {hint}")
    args = dict(args or {})
    parameters = _parameters(known[name])
    takes = f"it takes {', '.join(parameters) or 'none'}"
    if unknown := sorted(set(args) - set(parameters)):
        raise UserError(f"{where}.args: {name} does not take {', '.join(unknown)}; {takes}")
    distance = args.get("distance")
    if distance is not None:
        if not (isinstance(distance, Mapping) and {"name"} <= set(distance) <= {"name", "args"}):
            raise UserError(f"{where}.args.distance: write {{name: ..., args: {{...}}}}")
        args["distance"] = _build("distance", f"{where}.args.distance", str(distance["name"]), distance.get("args"))
    for key, size in (sizes or {}).items():
        if parameters.get(key) is inspect.Parameter.empty:
            args.setdefault(key, size)
    try:
        return known[name](**args, **arguments)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        refused, why = args or "to be built without args", error or type(error).__name__
        raise UserError(f"{where}: {name} refuses {refused}: {why}; {takes}") from error


def _parameters(cls: type) -> dict[str, Any]:
    """Names and defaults of a constructor's arguments, including those that ``**kwargs`` hands to bases."""
    defaults: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for p in parameters:
            if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                defaults.setdefault(p.name, p.default)
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    # The reducer has a field of its own in the config. The others are objects or internal.
    hidden = {"reducer", "collect_stats", "is_inverted", "weight_init_func"}
    return {name: value for name, value in defaults.items() if name not in hidden and not name.endswith("_regularizer")}
