"""Values that are NaN or infinite, noticed without waiting for a GPU in mid-step.

A peer computes a whole step before it reads whether all of it was finite. Until then a batch that is not finite goes
through the losses as stand-ins, since some of them fail on NaN, and what it has changed is undone afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def largest(embeddings: Tensor) -> Tensor:
    """The largest absolute value, a scalar on the device; NaN or infinite if one of them is."""
    return torch.linalg.vector_norm(embeddings.detach(), ord=torch.inf)


def or_stand_in(embeddings: Tensor, size: Tensor) -> Tensor:
    """(B, D) embeddings; or random rows of length 1, without a gradient, if ``size``, their largest value, is not
    finite."""
    return torch.where(size.isfinite(), embeddings, _unit_rows(*embeddings.shape, embeddings.dtype, embeddings.device))


@lru_cache(maxsize=64)
def _unit_rows(num: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(num, size, generator=generator)).to(device, dtype)


def read(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of scalars on the device, by name. They are copied together, so the device is waited for once."""
    return dict(zip(scalars, _packed(list(scalars.values())).tolist(), strict=True))


def all_finite(scalars: Sequence[Tensor]) -> Tensor:
    """Whether all scalars are finite, as a scalar on the device."""
    return _packed(scalars).isfinite().all()


def _packed(scalars: Sequence[Tensor]) -> Tensor:
    device = scalars[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([scalar.detach().to(device, dtype, non_blocking=True) for scalar in scalars])


class Undo:
    """What a forward pass changes in modules, to be restored if the batch is left out: buffers, and the rest of their
    state but the parameters, such as the next place in the memory of a loss."""

    def __init__(self, *modules: nn.Module) -> None:
        parts = [part for module in modules for part in module.modules()]
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (part, name, buffer, buffer.clone()) for part in parts for name, buffer in part.named_buffers(recurse=False)
        ]
        self._rest: list[tuple[nn.Module, Any]] = [
            (part, copy.deepcopy(part.get_extra_state()))
            for part in parts
            if type(part).get_extra_state is not nn.Module.get_extra_state
        ]

    def __call__(self) -> None:
        for part, name, buffer, value in self._buffers:
            part._buffers[name] = buffer.copy_(value)
        for part, state in self._rest:
            part.set_extra_state(state)
