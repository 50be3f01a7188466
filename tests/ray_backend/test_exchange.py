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
from conftest import state_of, unlike_peers
from torch.distributed import TCPStore

from ray_dmml.cohort.local import LocalCohort
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import PeerLostError
from ray_dmml.ray_backend.exchange import Member, checksum, verify
from ray_dmml.ray_backend.peer_actor import PeerActor, PeerPlace
from ray_dmml.ray_backend.ray_cohort import RayCohort
from ray_dmml.ray_backend.rendezvous import connect, store_at


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
        assert int(checksum(rows[1:])) == int(checksum(rows[1:].clone()))  # wherever the rows are in memory
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
def test_without_a_group_all_peers_use_the_coordinator(
    ray_start_4_cpus: None, image_folder: Path, tmp_path: Path
) -> None:
    """The first peer cannot open a store, or another one cannot join. One is enough. The bits are those of one
    process."""

    class Refused(PeerActor):
        """In its first generation the first peer cannot open a store, in the second one the second peer cannot join."""

        num_joined = 0

        def join(self, coordinator: Any, names: Sequence[str]) -> PeerPlace:
            self.num_joined += 1
            what, whose = [("store_at", "peer0"), ("DirectExchange", "peer1")][self.num_joined - 1]

            def refuse(*arguments: Any, **named: Any) -> None:
                raise OSError("no free port")

            def connect_soon(member: Member, transport: str, patience: float) -> Any:
                return connect(member, transport, 6.0)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("ray_dmml.ray_backend.rendezvous.connect", connect_soon)
                if self._peer.name == whose:
                    patch.setattr(f"ray_dmml.ray_backend.rendezvous.{what}", refuse)
                return super().join(coordinator, names)

    class RefusedCohort(RayCohort):
        peer_class = Refused

    config = unlike_peers(image_folder)
    splits = load_splits(config.data)
    with closing(LocalCohort(config, splits)) as local:
        expected = local.run(0, 4, lambda finished: None), state_of(local)
    with closing(RefusedCohort(config, splits)) as cohort:
        start = cohort.save(tmp_path)
        for reasons in (["no free port", "could open no store"], ["timeout", "no free port"]):
            for place, reason in zip(cohort.places.values(), reasons, strict=False):
                assert place.transport.startswith("coordinator, because no direct group could be formed")
                assert reason in place.transport
            assert (cohort.run(0, 4, lambda finished: None), state_of(cohort)) == expected
            if reasons[0] == "no free port":
                cohort.recover(PeerLostError(""))
                cohort.load(start)
