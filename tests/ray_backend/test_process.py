"""What the process of a peer sets up."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray


FAULTS = """
import resource
import torch
from ray_dmml.ray_backend.process import tune_malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
tune_malloc()
faults()
print(before, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="a setting of glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Tensors as large as activations are made and freed without asking the kernel for new pages."""
    ended = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, ended.stdout.split())
    assert before > 100
    assert after < before / 20
