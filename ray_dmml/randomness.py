"""Random numbers that depend only on a key: (run seed, the peer's own seed, step, phase).

torch, numpy and Python each have a global generator that libraries use (torchvision's transforms,
pytorch-metric-learning's miners, dropout). :func:`seeded` sets all of them inside a block and restores them afterwards.
Numbers drawn inside the block therefore depend only on the key, and not on what ran before, on the process, or on other
peers in it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine and in every process."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seeds the global generators of torch, numpy and Python with ``key`` for the length of the block.

    On a GPU this includes the generator of the current device, if CUDA has been initialised.

    The keys of a run are (its seed, the peer's seed, step, ``"view"``, ``"dropout"``, ``"miner"`` or ``"mutual"``) and
    (its seed, the peer's ``init_seed``, ``"init"`` or ``"head"``). The first step is 0.

    Examples:
        >>> import torch
        >>> from ray_dmml import seeded
        >>> with seeded(0, 1, 7, "view"):
        ...     first = torch.rand(2)
        >>> with seeded(0, 1, 7, "view"):
        ...     print(torch.equal(torch.rand(2), first))
        True
    """
    seed = derive_seed(*key)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would format a stack trace for each kind of device without a driver: a millisecond a call.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
