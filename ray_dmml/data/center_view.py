"""The view of evaluation: a resize and a centre crop, in two forms with the same pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

_MAX_WEIGHT, _MAX_BITS = 2**15, 22  # torch's weights are int16


class CenterView(nn.Module):
    """Resizes squares of side S to the side R, bilinear with antialiasing, and keeps the middle H x H.

    It is torchvision's resize: fast, and of uint8 on a CPU only.

    Args:
        size: H, at most R.
        resized: R.
        decode_size: S.
    """

    def __init__(self, size: int, resized: int, decode_size: int) -> None:
        super().__init__()
        self.size, self.resized, self.decode_size = size, resized, decode_size

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (..., 3, S, S) -> uint8 (..., 3, H, H)"""
        side = [self.resized, self.resized]
        return transforms.center_crop(transforms.resize(images, side), [self.size, self.size])

    def as_matrices(self) -> MatrixView:
        """The same pixels as on a CPU by arithmetic that every runtime and device has."""
        return MatrixView(self)


class MatrixView(nn.Module):
    """A :class:`CenterView` as two products with a matrix: first along the rows of an image, then along its columns.

    torch resizes uint8 images with integer weights, and rounds after each direction. Floats hold these integers
    exactly, so that the pixels are the same to the bit, on whatever computes in full float32 (TF32 is too coarse). It
    takes several times as long.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, view: CenterView) -> None:
        super().__init__()
        first = round((view.resized - view.size) / 2)  # as in torchvision's center_crop
        weights, self._bits = _integer_weights(view.decode_size, view.resized)
        weights = weights[first : first + view.size]
        used = weights.any(dim=0).nonzero().flatten()
        self._first, self._last = int(used[0]), int(used[-1]) + 1
        weights = weights[:, self._first : self._last]
        self._is_crop = view.resized == view.decode_size
        largest_sum = float(weights.sum(dim=1).max()) * 255 + 2**self._bits
        dtype = torch.float32 if largest_sum <= 2**24 else torch.float64
        self.register_buffer("rows", weights.to(dtype), persistent=False)
        self.register_buffer("columns", weights.T.to(dtype).contiguous(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> uint8 (B, 3, H, H)"""
        used = slice(self._first, self._last)
        images = images[:, :, used, used]
        if self._is_crop:
            return images
        in_one_direction = self._divide(images.to(self.columns.dtype) @ self.columns)
        return self._divide(self.rows @ in_one_direction).to(torch.uint8)

    def _divide(self, sums: Tensor) -> Tensor:
        """Divides by the sum of the weights; halves are rounded up."""
        return ((sums + 2 ** (self._bits - 1)) * 2.0**-self._bits).floor().clamp(0, 255)


def _integer_weights(old: int, new: int) -> tuple[Tensor, int]:
    """torch's weights (new, old) of a resize of uint8 in one direction, times 2 to the power of the returned number.

    That is the largest power at which they are int16.
    """
    identity = torch.eye(old, dtype=torch.float64)[None, None]
    weights = F.interpolate(identity, size=(old, new), mode="bilinear", antialias=True)[0, 0].T
    largest, bits = float(weights.max()), 0
    while bits < _MAX_BITS and math.floor(largest * 2 ** (bits + 1) + 0.5) < _MAX_WEIGHT:
        bits += 1
    return (weights * 2**bits + 0.5).floor(), bits
