"""The checksum beside the embeddings, the store where a group meets, and the way without a group."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from torch.distributed import TCPStore

from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import PeerLostError
from ray_dmml.ray_backend.exchange import checksum, verify
from ray_dmml.ray_backend.peer_actor import PeerActor, PeerPlace
from ray_dmml.ray_backend.ray_cohort import RayCohort
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


@pytest.mark.ray
@pytest.mark.parametrize(
    ("refuses", "reasons"),
    [("store_at", ["no free port", "could open no store"]), ("DirectExchange", ["timeout", "no free port"])],
)
def test_without_a_group_all_peers_use_the_coordinator(
    ray_start_4_cpus: None, image_folder: Path, refuses: str, reasons: list[str]
) -> None:
    """The first peer cannot open a store, or the second one cannot join. One is enough."""

    class Refused(PeerActor):
        def join(self, coordinator: Any, names: Sequence[str]) -> PeerPlace:
            def refuse(*arguments: Any, **named: Any) -> None:
                raise OSError("no free port")

            with pytest.MonkeyPatch.context() as patch:
                if refuses == "store_at" or self._peer.name == "peer1":
                    patch.setattr(f"ray_dmml.ray_backend.rendezvous.{refuses}", refuse)
                return super().join(coordinator, names)

    class Cohort(RayCohort):
        peer_class = Refused

    raw = tiny(image_folder)
    config = Config.parse({**raw, "cohort": {**raw["cohort"], "start_timeout_s": 60}})
    with closing(Cohort(config, load_splits(config.data))) as cohort:
        for place, reason in zip(cohort.places.values(), reasons, strict=True):
            assert place.transport.startswith("coordinator, because no direct group could be formed")
            assert reason in place.transport
        assert len(cohort.run(0, 2, lambda finished: None)) == 2
