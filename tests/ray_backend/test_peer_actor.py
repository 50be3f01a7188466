"""What is special to the process of a peer's actor."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from ray_dmml.ray_backend.exchange import store_at

FAULTS = """
import resource
import torch
from ray_dmml.ray_backend.peer_actor import tune_malloc

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


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="a setting of glibc's"
)
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Tensors as large as activations are made and freed without asking the kernel for new pages."""
    ended = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    before, after = map(int, ended.stdout.split())
    assert before > 100
    assert after < before / 20


def test_a_store_listens_at_its_own_address_only() -> None:
    """Whoever reaches it could change what peers tell each other; it does not ask who comes."""
    store = store_at("127.0.0.1", timedelta(seconds=20))
    TCPStore("127.0.0.1", store.port, is_master=False).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)
