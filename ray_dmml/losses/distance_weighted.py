"""Distance-weighted sampling of negatives, Euclidean distances without cancellation, and angles with a gradient.

They extend pytorch-metric-learning. The first two are the miner and the distance of the triplet baseline.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import distances, miners
from torch import Tensor


class ExactEuclideanDistance(distances.LpDistance):
    """L2 distances from differences, never from ``|x|² + |y|² - 2 x·y``.

    Above 25 rows torch.cdist uses the matrix product. In float32 that cancels for points near each
    other: embeddings within 1e-3 lose all their digits. The gradient at distance zero is zero.
    """

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(query_emb, ref_emb, compute_mode="donot_use_mm_for_euclid_dist")

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        # The library's version adds 1e-6 to every difference.
        return torch.linalg.vector_norm(query_emb - ref_emb, dim=1)


class BoundedCosineSimilarity(distances.CosineSimilarity):
    """Cosines within ±(1 - 1e-6): the angle of equal embeddings has a gradient, and it is zero. The derivative of the
    arc cosine at 1, which TupletMarginLoss needs for equal images, is infinite."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return super().compute_mat(query_emb, ref_emb).clamp(-1 + 1e-6, 1 - 1e-6)


class DistanceWeightedNegativeMiner(miners.BaseMiner):
    """Samples one negative for every positive pair of the batch, with weights by its distance.

    A negative at distance d from the anchor has the weight 1 / q(d). Here
    q(d) ~ d^(D-2) (1 - d²/4)^((D-3)/2) is the density of the distances between random points on the
    unit sphere in D dimensions.

    The weights of an anchor are divided by the largest one among its *eligible negatives*.
    pytorch-metric-learning's ``DistanceWeightedMiner`` divides by the largest one of the whole batch; then
    all weights of an anchor can underflow at D = 512. An anchor without eligible negatives samples uniformly
    from all its negatives. An anchor without negatives gives no triplets. Random numbers come from torch's
    global generator of the embeddings' device.

    Args:
        cutoff: smaller distances get the weight of this one.
        nonzero_loss_cutoff: negatives at this distance or beyond are not eligible. It is at most 2.

    Raises:
        ValueError: unless 0 < cutoff < nonzero_loss_cutoff <= 2.

    References:
        Wu, Manmatha, Smola, Krähenbühl, *Sampling Matters in Deep Embedding Learning*, ICCV 2017,
        https://arxiv.org/abs/1706.07567
    """

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < cutoff < nonzero_loss_cutoff <= 2:
            given = f"got cutoff {cutoff} and nonzero_loss_cutoff {nonzero_loss_cutoff}"
            raise ValueError(f"0 < cutoff < nonzero_loss_cutoff <= 2 is needed, {given}")
        self.cutoff, self.nonzero_loss_cutoff = float(cutoff), float(nonzero_loss_cutoff)

    def get_default_distance(self) -> distances.BaseDistance:
        return ExactEuclideanDistance()

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As every miner of the library. Labels may stay on the CPU: the pairs follow from them alone, and are then
        counted without waiting for the GPU that has the embeddings."""
        if ref_emb is not None:
            return super().forward(embeddings, labels, ref_emb, ref_labels)
        with torch.no_grad():
            return self.mine(embeddings, labels, embeddings, labels)

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of anchors, positives and negatives, (T,) int64 each, on the device of the embeddings; T counts the
        positive pairs."""
        same = labels[:, None] == ref_labels[None, :]
        positive = same.clone()
        if ref_emb is embeddings:
            positive.fill_diagonal_(False)
        has_negatives = ~same.all(dim=1, keepdim=True)
        positive &= has_negatives
        num_positives = positive.sum(dim=1)
        anchors, positives = torch.where(positive)
        # Every row samples as many as the row with the most positives needs, and keeps its first ones.
        most = int(num_positives.max())
        places = torch.where(torch.arange(most, device=labels.device) < num_positives[:, None])[1]
        same, has_negatives, anchors, positives, places = (
            each.to(embeddings.device, non_blocking=True) for each in (same, has_negatives, anchors, positives, places)
        )
        if most == 0:
            return anchors, positives, positives
        weights = self.weights(self.distance(embeddings, ref_emb), ~same, embeddings.shape[1])
        weights.masked_fill_(~has_negatives, 1)
        if not embeddings.is_cpu:
            most = max(most, 2)  # torch checks the weights of a single sample on the CPU
        samples = torch.multinomial(weights, most, replacement=True)
        return anchors, positives, samples[anchors, places]

    def weights(self, distance: Tensor, negative: Tensor, embedding_size: int) -> Tensor:
        """(B, R) sampling weights up to 1; ``negative`` is True for the negatives of an anchor.

        They are float64 (float32 on a device without float64). A row without a negative is zero.
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
