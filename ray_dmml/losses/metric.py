"""The metric loss of one peer, built by name from pytorch-metric-learning or own code: loss, miner and reducer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor, nn

from ray_dmml.config.parts import describe, find_part, is_own, make_part, place_of
from ray_dmml.config.schema import MetricLossConfig
from ray_dmml.errors import UserError
from ray_dmml.losses.distance_weighted import (
    BoundedCosineSimilarity,
    DistanceWeightedNegativeMiner,
    ExactEuclideanDistance,
)
from ray_dmml.losses.memory import CrossBatchMemory
from ray_dmml.losses.rehearsal import refuse_other_sizes, rehearse

_KINDS: dict[str, tuple[Any, type]] = {
    "loss": (losses, losses.BaseMetricLossFunction),
    "miner": (miners, miners.BaseMiner),
    "reducer": (reducers, reducers.BaseReducer),
    "distance": (distances, distances.BaseDistance),
}
_OURS: dict[str, dict[str, type]] = {
    "loss": {"CrossBatchMemory": CrossBatchMemory, "MultipleLosses": losses.MultipleLosses},
    "miner": {"DistanceWeightedNegativeMiner": DistanceWeightedNegativeMiner},
    "reducer": {},
    "distance": {},
}
"""Further classes by name: those of this package, and wrappers, which are no subclasses of the library's bases."""

_PARTS = {"distance": "distance", "loss": "loss", "losses": "loss", "miner": "miner", "miners": "miner"}
"""Arguments that are parts themselves, and of which kind."""

_TWO_VIEWS = "it needs two embeddings of each image"
_ABSTRACT = "it is abstract"
_UNSUPPORTED = {
    "DynamicSoftMarginLoss": "its running state is not in its state_dict",
    "HistogramLoss": "it fails on equal images",
    "SelfSupervisedLoss": _TWO_VIEWS,
    "VICRegLoss": _TWO_VIEWS,
    "ManifoldLoss": "it needs other inputs than embeddings and labels",
    "EmbeddingsAlreadyPackagedAsTriplets": "it needs batches of triplets",
    "GenericPairLoss": _ABSTRACT,
    "BaseLossWrapper": _ABSTRACT,
    "DoNothingReducer": "it gives no single number",
    "MultipleReducers": "its reducers are objects",
    "BatchedDistance": "its distance is an object",
}
"""Classes of the library that cannot be used here, and why."""


class MetricLoss(nn.Module):
    """Computes ``loss(embeddings, labels, miner(embeddings, labels))`` for one peer.

    The module's parameters are those of the loss, such as proxies or class centres. Every L2 distance
    in the loss and the miner is computed by
    :class:`~ray_dmml.losses.distance_weighted.ExactEuclideanDistance`.

    Args:
        config: names and arguments of the parts. An argument that is a part itself is a mapping:
            ``{name: CosineSimilarity, args: {...}}``. So are the losses and miners inside of ``CrossBatchMemory`` and
            ``MultipleLosses``, one or a list of them.
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
        self.loss: Any = _build("loss", "loss.metric", config.name, config.args, sizes, **arguments)
        self.miner: Any = None
        if config.miner is not None:
            self.miner = _build("miner", "loss.metric.miner", config.miner.name, config.miner.args)
        for module in list(self.modules()):
            old: Any = getattr(module, "distance", None)
            if type(old) is distances.LpDistance and old.p == 2:
                module.distance = ExactEuclideanDistance(normalize_embeddings=old.normalize_embeddings, power=old.power)
            elif isinstance(module, losses.TupletMarginLoss):
                module.distance = BoundedCosineSimilarity()
        if not is_own(config.name):
            refuse_other_sizes(config.args, num_classes, embedding_size)
        try:
            rehearse(self, num_classes, embedding_size)
        except Exception as error:
            names = [config.name, config.miner and config.miner.name, config.reducer]
            parts = " with ".join(name for name in names if name)
            reason = str(error).partition("\n")[0] or type(error).__name__
            if any(name and is_own(name) for name in names):
                reason = f"{describe(error)}{place_of(error)}"
            raise UserError(f"loss.metric: {parts} does not work with these settings: {reason}") from error

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, D) embeddings of any float dtype and (B,) int64 labels in [0, num_classes) -> a scalar.

        It is computed in float32 (float64 for float64 embeddings), also under autocast. A batch without a
        pair or triplet gives zero with a gradient. Labels on the CPU spare our miner
        a wait for the GPU.
        """
        on_device = labels.to(embeddings.device, non_blocking=True)
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            if self.miner is None:  # a loss of one's own need not know of miners
                return self.loss(embeddings, on_device)
            counts_on_cpu = isinstance(self.miner, DistanceWeightedNegativeMiner)
            mined = self.miner(embeddings, labels if counts_on_cpu else on_device)
            return self.loss(embeddings, on_device, mined)


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
    known |= _OURS[kind]
    args = {key: _build_inside(key, value, f"{where}.args.{key}", sizes) for key, value in (args or {}).items()}
    if name not in known and is_own(name):
        return _build_own(where if kind == "reducer" else f"{where}.name", name, {**args, **arguments}, sizes or {})
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
        if name in classes and name in _UNSUPPORTED:
            raise UserError(f"{where}: {kind} {name} cannot be used: {_UNSUPPORTED[name]}")
        raise UserError(f"{where}: there is no {kind} {name!r}; {hint}, or name your own as module:Class")
    parameters = _parameters(known[name])
    takes = f"it takes {', '.join(parameters) or 'none'}"
    if unknown := sorted(set(args) - set(parameters)):
        raise UserError(f"{where}.args: {name} does not take {', '.join(unknown)}; {takes}")
    for key, size in (sizes or {}).items():
        if parameters.get(key) is inspect.Parameter.empty:
            args.setdefault(key, size)
    try:
        return known[name](**args, **arguments)
    except Exception as error:  # wrappers raise nothing more special
        refused, why = args or "to be built without args", str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{where}: {name} refuses {refused}: {why}; {takes}") from error


def _build_own(setting: str, name: str, args: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    part: Any = find_part(setting, name)
    parameters = _parameters(part) if inspect.isclass(part) else {}
    needed = {key: size for key, size in sizes.items() if parameters.get(key) is inspect.Parameter.empty}
    return make_part(setting, name, {**needed, **args})


def _build_inside(key: str, value: Any, where: str, sizes: Mapping[str, int] | None) -> Any:
    """An argument of a part: a part of its own if the argument is one, a list of them, or a plain value."""
    kind = _PARTS.get(key)
    if kind is None or value is None:
        return value
    if isinstance(value, list) and key.endswith("s"):
        return [_build_inside(key, each, f"{where}.{n}", sizes) for n, each in enumerate(value)]
    allowed = {"name", "args", "reducer"} if kind == "loss" else {"name", "args"}
    is_part = isinstance(value, Mapping) and {"name"} <= set(value) <= allowed
    if not (is_part and isinstance(value.get("args") or {}, Mapping)):
        raise UserError(f"{where}: write {{name: ..., args: {{...}}}}")
    arguments = {}
    if value.get("reducer") is not None:
        arguments["reducer"] = _build("reducer", f"{where}.reducer", str(value["reducer"]))
    return _build(kind, where, str(value["name"]), value.get("args"), sizes, **arguments)


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
