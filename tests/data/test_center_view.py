"""The two forms of the evaluation view: torchvision's resize, and matrices for exported files."""

from __future__ import annotations

import pytest
import torch

from ray_dmml.data.center_view import CenterView, MatrixView

# (H, R, S): shrinking, enlarging, by more than 4 to 1 (float64), odd differences, a crop only, neither.
GEOMETRIES = [
    *[(32, 37, 50), (96, 110, 112), (21, 24, 57), (48, 48, 36), (40, 47, 33), (13, 15, 16)],
    *[(16, 18, 150), (8, 9, 200), (224, 256, 256), (31, 34, 34), (30, 30, 30)],
]


@pytest.mark.parametrize(("size", "resized", "decode_size"), GEOMETRIES)
def test_matrices_give_the_same_pixels(size: int, resized: int, decode_size: int) -> None:
    """Equal to the bit: of noise, of black and white, and of a plain surface."""
    noise = torch.randint(0, 256, (2, 3, decode_size, decode_size), dtype=torch.uint8)
    white = torch.full_like(noise[:1], 255)
    images = torch.cat([noise, (noise > 127) * white, white])
    view = CenterView(size, resized, decode_size)
    expected = view(images)
    assert expected.shape == (5, 3, size, size)
    found = view.as_matrices()(images)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)


def test_matrices_hold_only_what_is_used() -> None:
    """float32 where it is exact, and no rows of pixels outside of the crop."""
    view = MatrixView(CenterView(32, 64, 100))
    assert view.rows.dtype == torch.float32 and view.rows.shape[0] == 32
    assert 50 <= view.rows.shape[1] <= 54
    assert MatrixView(CenterView(8, 9, 200)).rows.dtype == torch.float64
