"""How a peer actor's embeddings reach the others: straight from peer to peer, or by the coordinator.

Both give the same bits. ``start`` returns at once and ``finish`` waits, so that the metric loss is
computed while the bytes travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from ray_dmml.cohort.coordinator import Group, Offer
from ray_dmml.errors import PeerLostError

_DIST_ERRORS = (RuntimeError, ValueError, OSError)


class Exchange(Protocol):
    """One peer's end of the exchange."""

    def start(self, step: int, embedding: Tensor) -> None:
        """Sends (B, D) float32 embeddings of a step on their way."""
        ...

    def finish(self) -> list[Tensor]:
        """The others' (B, D_n) float32 embeddings of that step, in peer order.

        Raises:
            PeerLostError: they did not come.
        """
        ...


class Alone:
    """The exchange of a cohort of one."""

    def start(self, step: int, embedding: Tensor) -> None:
        pass

    def finish(self) -> list[Tensor]:
        return []


class CoordinatorExchange:
    """The coordinator carries the data, as numpy arrays (a torch tensor costs Ray three times that)."""

    def __init__(self, coordinator: Any, position: int) -> None:
        self._coordinator, self._position = coordinator, position
        self._pending: Any = None

    def start(self, step: int, embedding: Tensor) -> None:
        array = embedding.cpu().numpy()
        self._pending = self._coordinator.exchange.remote(step, self._position, array)

    def finish(self) -> list[Tensor]:
        arrays = ray.get(self._pending)
        # Ray's arrays are read-only views at any address; a tensor of torch's own is writable and
        # aligned, and matrix products give the same bits only for the same alignment.
        return [torch.empty(a.shape).copy_(torch.tensor(a)) for a in arrays]


class DirectExchange:
    """A torch.distributed group of the peer actors, formed by the coordinator.

    Args:
        position: this peer's, which is its rank.
        sizes: embedding size of every peer, in peer order.
        store: where the group meets.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        position: int,
        sizes: Sequence[int],
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._position, self._sizes = position, tuple(sizes)
        # gloo wants equal shapes: narrower embeddings are padded to the widest.
        self._width = max(sizes)
        self._device = device if group.backend == "nccl" else torch.device("cpu")
        dist.init_process_group(
            group.backend,
            store=store,
            rank=position,
            world_size=len(sizes),
            timeout=timedelta(seconds=timeout_s),
            device_id=device if group.backend == "nccl" else None,
        )
        self._work: Any = None
        self._received: list[Tensor] = []
        self._step = -1

    def start(self, step: int, embedding: Tensor) -> None:
        num_rows, size = embedding.shape
        sent = torch.zeros(num_rows, self._width, device=self._device)
        sent[:, :size] = embedding
        self._received = [torch.empty_like(sent) for _ in self._sizes]
        self._step = step
        try:
            self._work = dist.all_gather(self._received, sent, async_op=True)
        except _DIST_ERRORS as error:
            raise PeerLostError(f"exchange of step {step + 1} failed: {error}") from None

    def finish(self) -> list[Tensor]:
        try:
            self._work.wait()
        except _DIST_ERRORS as error:
            raise PeerLostError(f"exchange of step {self._step + 1} failed: {error}") from None
        return [
            received[:, :size].contiguous()
            for i, (received, size) in enumerate(zip(self._received, self._sizes, strict=True))
            if i != self._position
        ]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def connect(
    transport: str,
    coordinator: Any,
    position: int,
    sizes: Sequence[int],
    device: torch.device,
    exchange_timeout_s: float,
    start_timeout_s: float,
) -> tuple[Exchange, str]:
    """A peer's end of the exchange, and the way that was taken, with the reason if not the asked.

    ``direct`` falls back to the coordinator, for all peers alike, where no group can be formed.
    """
    if len(sizes) == 1:
        return Alone(), "none"
    if transport == "coordinator":
        return CoordinatorExchange(coordinator, position), "coordinator"
    direct: DirectExchange | None = None
    reason = "another peer could not join"
    try:
        direct = _join_group(
            coordinator, position, sizes, device, exchange_timeout_s, start_timeout_s
        )
    except _DIST_ERRORS as error:
        reason = str(error).splitlines()[0]
    if ray.get(coordinator.all_agree.remote(position, direct is not None)):
        assert direct is not None
        return direct, "direct"
    if direct is not None:
        direct.close()
    how = f"coordinator, as no direct group could be formed ({reason})"
    return CoordinatorExchange(coordinator, position), how


def _join_group(
    coordinator: Any,
    position: int,
    sizes: Sequence[int],
    device: torch.device,
    exchange_timeout_s: float,
    start_timeout_s: float,
) -> DirectExchange:
    timeout = timedelta(seconds=start_timeout_s)
    name = "cpu"
    if device.type == "cuda":
        name = str(torch.cuda.get_device_properties(device).uuid)
    own_store: Store | None = None
    address: tuple[str, int] | None = None
    reason = "the first peer could open no store"
    if position == 0:
        # Port 0: the system picks a free one, and no other process can take it in between.
        host = ray.util.get_node_ip_address()
        try:
            own_store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            address = (host, own_store.port)
        except _DIST_ERRORS as error:
            reason = f"no store on {host}: {error}"  # said below: the others wait for our offer
    group: Group | None = ray.get(coordinator.form_group.remote(position, Offer(name, address)))
    if group is None:
        raise RuntimeError(reason)
    store = own_store or TCPStore(*group.store, is_master=False, timeout=timeout)
    return DirectExchange(group, store, position, sizes, device, exchange_timeout_s)
