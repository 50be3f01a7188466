"""The search for nearest neighbours on a GPU, for evaluations that are large enough to be worth one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MIN_PAIRS = 10**9
"""Pairs of a query and a gallery row, below which a CPU is done before a GPU has started."""

BLOCK = 2**17
"""Gallery rows whose similarities are in memory at a time, with those of some thousand queries: 2 GiB."""

logger = logging.getLogger(__name__)


class GpuGallery:
    """Gallery rows in the memory of a device.

    Args:
        gallery: (G, D) float32.
        device: such as ``cuda``.
    """

    def __init__(self, gallery: Floats, device: str) -> None:
        import torch

        self._rows = torch.from_numpy(gallery).to(device)

    def nearest(self, queries: Floats, k: int) -> tuple[Floats, Ints] | None:
        """(q, k) largest inner products of each query, in falling order, and their rows; ties in any order. None: the
        device has no room.

        Args:
            queries: (q, D) float32.
            k: at most G.
        """
        import torch

        try:
            return self._nearest(queries, k)
        except torch.OutOfMemoryError:
            return None

    def _nearest(self, queries: Floats, k: int) -> tuple[Floats, Ints]:
        import torch

        points = torch.from_numpy(queries).to(self._rows.device)
        best = torch.empty((len(points), 0), device=points.device)
        rows = torch.empty((len(points), 0), dtype=torch.int64, device=points.device)
        for start in range(0, len(self._rows), BLOCK):
            found, at = _exact_product(points, self._rows[start : start + BLOCK]).topk(
                min(k, len(self._rows) - start, BLOCK), dim=1
            )
            both, both_rows = torch.cat([best, found], dim=1), torch.cat([rows, at + start], dim=1)
            best, places = both.topk(min(k, both.shape[1]), dim=1)
            rows = both_rows.gather(1, places)
        return best.cpu().numpy(), rows.cpu().numpy()


def gallery_on_gpu(gallery: Floats, num_queries: int) -> GpuGallery | None:
    """The gallery on the first GPU; None without one, if the search is small, or where the GPU has no room."""
    if num_queries * len(gallery) < MIN_PAIRS:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return GpuGallery(gallery, "cuda")
    except torch.OutOfMemoryError:
        logger.info("the GPU has no room for a gallery of %d embeddings: it is searched on the CPU", len(gallery))
        return None


def _exact_product(points: torch.Tensor, rows: torch.Tensor) -> Any:
    """(q, n) inner products in float32, whatever the program has allowed for its nets (TF32)."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return points @ rows.T
    finally:
        torch.set_float32_matmul_precision(before)
