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
from ray_dmml.cohort.teachers import Teachers, students
from ray_dmml.errors import PeerLostError

INLINE_PART_BYTES = 96 * 1024
"""Just below Ray's limit for what travels inside a call (100 KiB with its header)."""

INLINE_EMBEDDING_BYTES = 2**20
"""Larger embeddings go through the object store in one piece."""

_DIST_ERRORS = (RuntimeError, ValueError, OSError)


class Exchange(Protocol):
    """One peer's end of the exchange."""

    def start(self, step: int, embedding: Tensor) -> None:
        """Sends (B, D) float32 embeddings of a step on their way."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...

    def finish(self) -> list[Tensor]:
        """The (B, D_n) float32 embeddings of this peer's teachers of that step, in peer order.

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

    def close(self) -> None:
        pass


class CoordinatorExchange:
    """The coordinator carries the data, as numpy arrays (a torch tensor costs Ray three times that)."""

    def __init__(
        self, coordinator: Any, position: int, sizes: Sequence[int], teachers: Teachers
    ) -> None:
        self._coordinator, self._position = coordinator, position
        self._sizes, self._teachers = tuple(sizes), teachers
        self._pending: list[Any] = []
        self._shapes: list[tuple[int, int]] = []

    def start(self, step: int, embedding: Tensor) -> None:
        teachers = self._teachers.at(step)[self._position]
        array = embedding.cpu().numpy()
        self._shapes = [(len(array), self._sizes[teacher]) for teacher in teachers]
        count = sum(len(_parts(*shape)) for shape in self._shapes)
        pending = self._coordinator.exchange.options(num_returns=count).remote(
            step, self._position, teachers, *(array[rows] for rows in _parts(*array.shape))
        )
        self._pending = [pending] if count == 1 else pending

    def finish(self) -> list[Tensor]:
        parts = iter(ray.get(self._pending))
        found = []
        for shape in self._shapes:
            # Ray's arrays are read-only views at any address; a tensor of torch's own is writable
            # and aligned, and matrix products give the same bits only for the same alignment.
            embedding = torch.empty(shape)
            for rows in _parts(*shape):
                embedding.numpy()[rows] = next(parts)
            found.append(embedding)
        return found

    def close(self) -> None:
        pass


def _parts(num_rows: int, size: int) -> list[slice]:
    """The rows of (N, D) float32 in blocks that travel inside a call of an actor.

    Ray sends an argument or result beyond its limit through the object store, which takes longer
    than to copy it; very large embeddings are better off there, in one piece.
    """
    if num_rows * size * 4 > INLINE_EMBEDDING_BYTES:
        return [slice(0, num_rows)]
    block = max(1, INLINE_PART_BYTES // (size * 4))
    return [slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block)]


class DirectExchange:
    """A torch.distributed group of the peer actors, formed by the coordinator.

    One collective where everybody learns from everybody, else a message from each teacher.

    Args:
        position: this peer's, which is its rank.
        sizes: embedding size of every peer, in peer order.
        teachers: who learns from whom.
        store: where the group meets.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        position: int,
        sizes: Sequence[int],
        teachers: Teachers,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._position, self._sizes, self._teachers = position, tuple(sizes), teachers
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
        self._pending: list[Any] = []
        self._received: dict[int, Tensor] = {}
        self._step = -1

    def start(self, step: int, embedding: Tensor) -> None:
        self._step = step
        try:
            if self._teachers.all_others:
                self._gather(embedding)
            else:
                self._send(embedding, self._teachers.at(step))
        except _DIST_ERRORS as error:
            raise PeerLostError(f"exchange of step {step + 1} failed: {error}") from None

    def finish(self) -> list[Tensor]:
        try:
            for work in self._pending:
                work.wait()
        except _DIST_ERRORS as error:
            raise PeerLostError(f"exchange of step {self._step + 1} failed: {error}") from None
        return [
            received[:, : self._sizes[teacher]].contiguous()
            for teacher, received in self._received.items()
        ]

    def _gather(self, embedding: Tensor) -> None:
        """From all to all."""
        num_rows, size = embedding.shape
        sent = torch.zeros(num_rows, self._width, device=self._device)
        sent[:, :size] = embedding
        received = [torch.empty_like(sent) for _ in self._sizes]
        self._pending = [dist.all_gather(received, sent, async_op=True)]
        self._received = {n: rows for n, rows in enumerate(received) if n != self._position}

    def _send(self, embedding: Tensor, teachers: Sequence[Sequence[int]]) -> None:
        """To this peer's students, from its teachers."""
        sent = embedding.to(self._device).contiguous()
        self._received = {
            teacher: torch.empty(len(sent), self._sizes[teacher], device=self._device)
            for teacher in teachers[self._position]
        }
        self._pending = dist.batch_isend_irecv(
            [
                *(
                    dist.P2POp(dist.isend, sent, student)
                    for student in students(teachers, self._position)
                ),
                *(
                    dist.P2POp(dist.irecv, rows, teacher)
                    for teacher, rows in self._received.items()
                ),
            ]
        )

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def connect(
    transport: str,
    coordinator: Any,
    position: int,
    sizes: Sequence[int],
    teachers: Teachers,
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
        return CoordinatorExchange(coordinator, position, sizes, teachers), "coordinator"
    direct: DirectExchange | None = None
    reason = "another peer could not join"
    try:
        direct = _join_group(
            coordinator, position, sizes, teachers, device, exchange_timeout_s, start_timeout_s
        )
    except _DIST_ERRORS as error:
        reason = str(error).splitlines()[0]
    if ray.get(coordinator.all_agree.remote(position, direct is not None)):
        assert direct is not None
        return direct, "direct"
    if direct is not None:
        direct.close()
    how = f"coordinator, as no direct group could be formed ({reason})"
    return CoordinatorExchange(coordinator, position, sizes, teachers), how


def _join_group(
    coordinator: Any,
    position: int,
    sizes: Sequence[int],
    teachers: Teachers,
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
    return DirectExchange(group, store, position, sizes, teachers, device, exchange_timeout_s)
