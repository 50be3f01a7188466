"""Random numbers that depend on a key only."""

from __future__ import annotations

import doctest
import random

import numpy as np
import torch

from ray_dmml import randomness, seeded


def drawn() -> list[float]:
    return [torch.rand(()).item(), np.random.rand(), random.random()]


def test_numbers_depend_on_the_key_and_leave_the_others_alone() -> None:
    """Another key gives others. What comes after a block is as without it."""
    with seeded(0, 1, 7, "view"):
        first = drawn()
        with seeded(0, 1, 8, "view"):
            inner = drawn()
        then = drawn()
    with seeded(0, 1, 7, "view"):
        assert [drawn(), drawn()] == [first, then]
    assert not {*first} & {*inner}


def test_the_example_runs() -> None:
    assert doctest.testmod(randomness).failed == 0
