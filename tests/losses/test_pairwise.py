"""Pairs of a batch against their definition."""

from __future__ import annotations

import pytest
import torch

from ray_dmml.losses.pairwise import Pairwise


@pytest.mark.parametrize(("num", "size"), [(1, 3), (33, 7), (5, 1025), (70, 2500)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_pairs_are_those_of_all_dimensions(num: int, size: int, requires_grad: bool) -> None:
    """Also of more images and dimensions than one block holds, as an ensemble's, which has no gradient."""
    x = torch.randn(num, size, generator=torch.Generator().manual_seed(0)) + 3
    pairs = Pairwise.of(x.clone().requires_grad_(requires_grad))
    centred = x.double() - x.double().mean(dim=0)
    differences = x.double()[:, None] - x.double()[None]
    torch.testing.assert_close(pairs.gram.detach(), centred @ centred.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pairs.distances.detach(), differences.norm(dim=2), rtol=1e-10, atol=1e-10)
