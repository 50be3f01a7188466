"""The metric loss of one peer, built by name from pytorch-metric-learning: loss, miner and reducer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor, nn

from ray_dmml.config.schema import MetricLossConfig
from ray_dmml.errors import UserError
from ray_dmml.losses.distance_weighted import (
    DistanceWeightedNegativeMiner,
    ExactEuclideanDistance,
)
from ray_dmml.randomness import seeded


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
        UserError: a name is unknown, a class refuses its arguments, or the parts do not work together.

    Relations:
        A peer adds :class:`~ray_dmml.losses.mutual.MutualLoss`, which learns from the other peers.
    """

    def __init__(self, config: MetricLossConfig, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        where = "loss.metric"
        sizes = {
            "num_classes": num_classes,
            "embedding_size": embedding_size,
            "descriptors_dim": embedding_size,  # P2SGradLoss's name for D
        }
        arguments: dict[str, Any] = {}
        if config.reducer is not None:
            arguments["reducer"] = _build(reducers, "reducer", f"{where}.reducer", config.reducer)
        self.loss: nn.Module = _build(losses, "loss", where, config.name, config.args, sizes, **arguments)
        self.miner: nn.Module | None = None
        if config.miner is not None:
            self.miner = _build(miners, "miner", f"{where}.miner", config.miner.name, config.miner.args)
        for module in list(self.modules()):
            if type(getattr(module, "distance", None)) is distances.LpDistance:
                _make_exact(module)
        self._dry_run(config, num_classes, embedding_size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, computed in float32 (float64 for float64 embeddings), also under autocast.

        Args:
            embeddings: (B, D) of any float dtype, usually L2-normalised.
            labels: (B,) int64 in [0, num_classes).

        Returns:
            A scalar. A batch without a pair or triplet gives zero with a gradient.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            mined = self.miner(embeddings, labels) if self.miner is not None else None
            loss: Tensor = self.loss(embeddings, labels, mined)
        return loss

    def _dry_run(self, config: MetricLossConfig, num_classes: int, embedding_size: int) -> None:
        """Runs one small batch, so that parts which do not work together fail before training."""
        labels = torch.arange(8) // 2 % num_classes
        try:
            with seeded("dry run"), torch.no_grad():
                result = self(torch.eye(8, embedding_size) + 0.1, labels)
                if not (isinstance(result, Tensor) and result.ndim == 0):
                    raise TypeError("the result is not a single number")
        except (TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
            parts = [config.name, config.miner and config.miner.name, config.reducer]
            raise UserError(
                f"loss.metric: {' with '.join(part for part in parts if part)} does not work with "
                f"these settings: {error or type(error).__name__}"
            ) from error


_KINDS: dict[str, type] = {
    "loss": losses.BaseMetricLossFunction,
    "miner": miners.BaseMiner,
    "reducer": reducers.BaseReducer,
    "distance": distances.BaseDistance,
}
_UNSUPPORTED = {
    "DynamicSoftMarginLoss",  # its running state is not in its state_dict
    "HistogramLoss",  # fails on duplicate images
    # Abstract classes, and classes that need other inputs than embeddings and labels:
    "BaseMetricLossFunction",
    "GenericPairLoss",
    "ManifoldLoss",
    "VICRegLoss",
    "BaseMiner",
    "EmbeddingsAlreadyPackagedAsTriplets",
    "BaseReducer",
    "DoNothingReducer",
    "MultipleReducers",
    "BaseDistance",
    "BatchedDistance",
}


def _build(
    library: ModuleType,
    kind: str,
    where: str,
    name: str,
    args: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    **arguments: Any,
) -> Any:
    """Builds the library's class of this name. ``sizes`` are passed to a class that requires them."""
    known = {
        key: value
        for key, value in vars(library).items()
        if inspect.isclass(value) and issubclass(value, _KINDS[kind]) and key not in _UNSUPPORTED
    }
    if kind == "miner":
        known[DistanceWeightedNegativeMiner.__name__] = DistanceWeightedNegativeMiner
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
        where_distance = f"{where}.args.distance"
        if not (isinstance(distance, Mapping) and {"name"} <= set(distance) <= {"name", "args"}):
            raise UserError(f"{where_distance}: write {{name: ..., args: {{...}}}}")
        args["distance"] = _build(distances, "distance", where_distance, str(distance["name"]), distance.get("args"))
    for key, size in (sizes or {}).items():
        if parameters.get(key) is inspect.Parameter.empty:
            args.setdefault(key, size)
    try:
        return known[name](**args, **arguments)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise UserError(
            f"{where}: {name} refuses {args or 'to be built without args'}: {error or type(error).__name__}; {takes}"
        ) from error


def _parameters(cls: type) -> dict[str, Any]:
    """Names and defaults of a constructor's arguments, including those that ``**kwargs`` hands to bases."""
    defaults: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                defaults.setdefault(parameter.name, parameter.default)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    # The reducer has a field of its own in the config. The others are objects or internal.
    for name in ("reducer", "collect_stats", "is_inverted", "weight_init_func"):
        defaults.pop(name, None)
    return {name: default for name, default in defaults.items() if not name.endswith("_regularizer")}


def _make_exact(module: nn.Module) -> None:
    """Replaces the L2 distance of a module by the exact one."""
    old: Any = module.distance
    if old.p == 2:
        module.distance = ExactEuclideanDistance(normalize_embeddings=old.normalize_embeddings, power=old.power)
