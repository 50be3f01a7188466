"""Every random number comes from (run seed, the drawer's own key, step, phase).

torch, numpy and Python each have one global generator that libraries draw from (torchvision's
transforms, pytorch-metric-learning's miners, dropout). :func:`seeded` sets all of them for the
length of a block and puts them back, so what is drawn inside depends on the key alone: not on what
ran before, in which process, or beside whom.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key; the same on every machine and in every process."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Inside the block the global generators of torch, numpy and Python follow from ``key`` alone."""
    seed = derive_seed(*key)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
