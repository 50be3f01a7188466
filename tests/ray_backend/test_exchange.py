"""The checksum beside the embeddings, and the store where a group meets."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from ray_dmml.errors import PeerLostError
from ray_dmml.ray_backend.exchange import checksum, verify
from ray_dmml.ray_backend.rendezvous import store_at


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 512)])
def test_a_checksum_sees_every_change(shape: tuple[int, int]) -> None:
    """A flipped bit, swapped values, the sign of a zero."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    right = int(checksum(rows))
    assert int(checksum(rows.clone())) == right
    for bit in range(32):
        changed = rows.clone()
        changed.view(torch.int32)[-1, 0] ^= 1 << bit if bit < 31 else -(2**31)
        assert int(checksum(changed)) != right
    if rows.numel() > 1:
        assert int(checksum(rows.flip(0, 1))) != right
    assert int(checksum(torch.zeros(1, 2))) != int(checksum(torch.tensor([[0.0, -0.0]])))
    with pytest.raises(PeerLostError, match="peer9 at step 3 were damaged"):
        verify(rows, right + 1, "peer9", 2)


def test_a_store_listens_at_its_own_address_only() -> None:
    """It does not ask who connects, and whoever reaches it could change what peers exchange."""
    store = store_at("127.0.0.1", timedelta(seconds=20))
    TCPStore("127.0.0.1", store.port, is_master=False).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)
