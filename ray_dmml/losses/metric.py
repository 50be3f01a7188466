"""A peer's own metric loss: a loss, a miner and a reducer of pytorch-metric-learning, by name.

To the library's miners this adds distance-weighted sampling of negatives, the one of the triplet
baseline; to its distances the Euclidean one without a matrix product.
"""

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
from ray_dmml.randomness import seeded


class ExactEuclideanDistance(distances.LpDistance):
    """L2 distances by differences, never by ``|x|² + |y|² - 2 x·y``.

    Above 25 rows torch.cdist takes the matrix product, which in float32 cancels for points near one
    another: embeddings within 1e-3 lose all their digits. The gradient at distance zero is zero.
    """

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D) and (R, D) to (B, R)."""
        return torch.cdist(query_emb, ref_emb, compute_mode="donot_use_mm_for_euclid_dist")

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D) twice to (B,); the library's adds 1e-6 to every difference."""
        distance: Tensor = torch.linalg.vector_norm(query_emb - ref_emb, dim=1)
        return distance


class DistanceWeightedNegativeMiner(miners.BaseMiner):
    """Every positive pair of the batch, each with one negative drawn by distance-weighted sampling.

    Wu, Manmatha, Smola, Krähenbühl, *Sampling Matters in Deep Embedding Learning*, ICCV 2017,
    https://arxiv.org/abs/1706.07567. A negative at distance d of its anchor is drawn with a weight
    of 1 / q(d), where q(d) ~ d^(D-2) (1 - d²/4)^((D-3)/2) is the density of the distances between
    points on the unit sphere in D dimensions.

    The weights of an anchor are scaled by the largest one among its *eligible negatives*: with its
    positives in the maximum, as in common code, all weights underflow at D = 512 once a positive is
    near. Where no negative is eligible, one is drawn uniformly from all of them; an anchor without
    negatives gives no triplets. Draws come from torch's global generator of the embeddings' device.

    Args:
        cutoff: smaller distances weigh as this one.
        nonzero_loss_cutoff: negatives at this distance or beyond are not drawn; 2 at most.

    Raises:
        ValueError: unless 0 < cutoff < nonzero_loss_cutoff <= 2.
    """

    def __init__(
        self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < cutoff < nonzero_loss_cutoff <= 2:
            raise ValueError(
                "0 < cutoff < nonzero_loss_cutoff <= 2 is needed, "
                f"got cutoff {cutoff} and nonzero_loss_cutoff {nonzero_loss_cutoff}"
            )
        self.cutoff = float(cutoff)
        self.nonzero_loss_cutoff = float(nonzero_loss_cutoff)

    def get_default_distance(self) -> distances.BaseDistance:
        """L2 between normalised embeddings."""
        return ExactEuclideanDistance()

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of anchors, positives and negatives, (T,) int64 each, T the positive pairs."""
        same = labels[:, None] == ref_labels[None, :]
        weights = self.weights(self.distance(embeddings, ref_emb), ~same, embeddings.shape[1])
        positive = same.clone()
        if ref_emb is embeddings:
            positive.fill_diagonal_(False)
        positive[same.all(dim=1)] = False
        num_positives = positive.sum(dim=1)
        anchors, positives = torch.where(positive)
        if len(anchors) == 0:
            return anchors, positives, positives.clone()
        # As many draws in every row as its busiest one needs; a row keeps its first ones.
        weights[same.all(dim=1)] = 1
        most = int(num_positives.max())
        drawn = torch.multinomial(weights, most, replacement=True)
        needed = torch.arange(most, device=drawn.device) < num_positives[:, None]
        return anchors, positives, drawn[needed]

    def weights(self, distance: Tensor, negative: Tensor, embedding_size: int) -> Tensor:
        """Weights of the draws, at most 1; rows without a negative are zero.

        Args:
            distance: (B, R) from anchors to the others.
            negative: (B, R) bool, which of them may be drawn.
            embedding_size: D.

        Returns:
            (B, R) float64 (float32 on a device without it).
        """
        precise = torch.float32 if distance.device.type == "mps" else torch.float64
        d = distance.to(precise).clamp(min=self.cutoff)
        eligible = negative & (d < self.nonzero_loss_cutoff)
        log_weights = (2 - embedding_size) * d.log()
        log_weights -= (embedding_size - 3) / 2 * (1 - d.square() / 4).log()
        log_weights = log_weights.masked_fill(~eligible, -torch.inf)
        none = ~eligible.any(dim=1, keepdim=True)
        largest = log_weights.amax(dim=1, keepdim=True).masked_fill(none, 0)
        return torch.where(none, negative.to(precise), (log_weights - largest).exp())


class MetricLoss(nn.Module):
    """The metric loss of one peer: ``loss(embeddings, labels, miner(embeddings, labels))``.

    Its parameters are those of the loss (proxies, centres), if it has any. Where loss and miner
    measure L2 distances, they do so by :class:`ExactEuclideanDistance`.

    Args:
        config: names and settings. A setting ``distance`` of the loss or the miner is a mapping:
            ``{name: CosineSimilarity, args: {...}}``.
        num_classes: of the training data; given to the loss if it requires it.
        embedding_size: D; given to the loss if it requires it.

    Raises:
        UserError: a name is unknown, a class refuses its settings, or the parts do not fit.
    """

    def __init__(self, config: MetricLossConfig, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        where = "loss.metric"
        # P2SGradLoss has its own name for D.
        sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
        sizes["descriptors_dim"] = embedding_size
        arguments: dict[str, Any] = {}
        if config.reducer is not None:
            arguments["reducer"] = _build(reducers, "reducer", f"{where}.reducer", config.reducer)
        self.loss: nn.Module = _build(
            losses, "loss", where, config.name, config.args, sizes, **arguments
        )
        self.miner: nn.Module | None = None
        if config.miner is not None:
            chosen = config.miner
            self.miner = _build(miners, "miner", f"{where}.miner", chosen.name, chosen.args)
        for module in list(self.modules()):
            if type(getattr(module, "distance", None)) is distances.LpDistance:
                _make_exact(module)
        self._dry_run(config, num_classes, embedding_size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, in float32 (float64 for float64 embeddings), autocast or not.

        Args:
            embeddings: (B, D) of any float dtype, usually L2-normalised.
            labels: (B,) int64 in [0, num_classes).

        Returns:
            A scalar; a zero with a gradient where the batch has no pair or triplet to offer.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            mined = self.miner(embeddings, labels) if self.miner is not None else None
            loss: Tensor = self.loss(embeddings, labels, mined)
        return loss

    def _dry_run(self, config: MetricLossConfig, num_classes: int, embedding_size: int) -> None:
        """One small batch, so that parts which do not fit together are known before training."""
        labels = torch.arange(8) // 2 % num_classes
        try:
            with seeded("rehearsal"), torch.no_grad():
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
# Abstract classes; those that take no labels or no batch as ours; HistogramLoss fails on duplicate
# images, and DynamicSoftMarginLoss keeps a running state that no checkpoint would hold.
_UNFIT = {
    "DynamicSoftMarginLoss",
    "HistogramLoss",
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
    """An object of the library's class of this name; ``sizes`` are given where it requires them."""
    known = {
        key: value
        for key, value in vars(library).items()
        if inspect.isclass(value) and issubclass(value, _KINDS[kind]) and key not in _UNFIT
    }
    if kind == "miner":
        known[DistanceWeightedNegativeMiner.__name__] = DistanceWeightedNegativeMiner
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
        raise UserError(f"{where}: there is no {kind} {name!r} here; near are {', '.join(near)}")
    args = dict(args or {})
    takes = _parameters(known[name])
    unknown = sorted(set(args) - set(takes))
    if unknown:
        raise UserError(
            f"{where}.args: {name} does not take {', '.join(unknown)}; "
            f"it takes {', '.join(takes) or 'none'}"
        )
    chosen = args.get("distance")
    if chosen is not None:
        if not (isinstance(chosen, Mapping) and {"name"} <= set(chosen) <= {"name", "args"}):
            raise UserError(f"{where}.args.distance: write {{name: ..., args: {{...}}}}")
        inside = f"{where}.args.distance"
        args["distance"] = _build(
            distances, "distance", inside, str(chosen["name"]), chosen.get("args")
        )
    for key, size in (sizes or {}).items():
        if takes.get(key) is inspect.Parameter.empty:
            args.setdefault(key, size)
    try:
        return known[name](**args, **arguments)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise UserError(
            f"{where}: {name} refuses {args or 'to be built without args'}: "
            f"{error or type(error).__name__}; it takes {', '.join(takes) or 'none'}"
        ) from error


def _parameters(cls: type) -> dict[str, Any]:
    """Names and defaults of a constructor's arguments, its bases' behind ``**kwargs`` too."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                found.setdefault(parameter.name, parameter.default)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    # The reducer has a field of its own; the others cannot be written in YAML or are not for it.
    for name in ("reducer", "collect_stats", "is_inverted", "weight_init_func"):
        found.pop(name, None)
    return {name: default for name, default in found.items() if not name.endswith("_regularizer")}


def _make_exact(module: nn.Module) -> None:
    """Replaces a module's L2 distance by the exact one."""
    old: Any = module.distance
    if old.p == 2:
        module.distance = ExactEuclideanDistance(
            normalize_embeddings=old.normalize_embeddings, power=old.power
        )
