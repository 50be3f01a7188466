"""How a peer actor's embeddings reach the others: straight from peer to peer, or by the coordinator.

Both give the same bits. ``start`` returns at once and ``finish`` waits, so that the metric loss is
computed while the bytes travel.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from ray_dmml.cohort.teachers import Teachers, students
from ray_dmml.errors import ExchangeLostError, PeerLostError
from ray_dmml.ray_backend.coordinator import Group, Offer

INLINE_PART_BYTES = 96 * 1024
"""Just below Ray's limit for what travels inside a call (100 KiB with its header)."""

CHECKSUM_FLOATS = 2
"""An int64 in the place of so many float32."""

INLINE_EMBEDDING_BYTES = 2**20
"""Larger embeddings go through the object store in one piece."""

_DIST_ERRORS = (RuntimeError, ValueError, OSError)

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""

_NEVER = timedelta(days=7)
"""Waits inside a group have no deadline of their own: the driver ends those who keep others waiting."""


def checksum(rows: Tensor) -> Tensor:
    """Of (N, D) float32, an int64 scalar on the same device: any changed or moved bit changes it."""
    bits = rows.contiguous().view(torch.int32).flatten().to(torch.int64)
    weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd, so that none hides a bit
    return (bits * weights).sum()  # wraps around, the same everywhere


def _verified(rows: Tensor, expected: int, teacher: str, step: int) -> Tensor:
    """Raises PeerLostError where the rows are not those that were sent."""
    if int(checksum(rows)) != expected:
        raise PeerLostError(
            f"the embeddings of {teacher} of step {step + 1} were damaged on their way"
        )
    return rows


@dataclass(frozen=True)
class Members:
    """The peers of a generation, in peer order; the place of one is its rank."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Their embedding sizes."""


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
            PeerLostError: they did not come, or not as they were sent.
        """
        ...


class NoExchange:
    """The exchange of a cohort of one."""

    def start(self, step: int, embedding: Tensor) -> None:
        pass

    def finish(self) -> list[Tensor]:
        return []

    def close(self) -> None:
        pass


class CoordinatorExchange:
    """The coordinator carries the data, as numpy arrays (a torch tensor costs Ray three times that)."""

    def __init__(self, coordinator: Any, rank: int, members: Members, teachers: Teachers) -> None:
        self._coordinator, self._rank = coordinator, rank
        self._members, self._teachers = members, teachers
        self._pending: list[Any] = []
        self._expected: list[int] = []
        self._num_rows, self._step = 0, -1

    def start(self, step: int, embedding: Tensor) -> None:
        self._expected = list(self._teachers.at(step)[self._rank])
        self._num_rows, self._step = len(embedding), step
        array = embedding.cpu().numpy()
        sizes = [self._members.sizes[teacher] for teacher in self._expected]
        count = 1 + sum(len(_parts(self._num_rows, size)) for size in sizes)
        self._pending = self._coordinator.exchange.options(num_returns=count).remote(
            step,
            self._rank,
            self._expected,
            int(checksum(embedding)),
            *(array[rows] for rows in _parts(*array.shape)),
        )
        if count == 1:  # nobody teaches it at this step
            self._pending = [self._pending]

    def finish(self) -> list[Tensor]:
        checksums, *rest = ray.get(self._pending)
        parts = iter(rest)
        found = []
        for teacher, expected in zip(self._expected, checksums, strict=True):
            shape = (self._num_rows, self._members.sizes[teacher])
            # Ray's arrays are read-only views at any address; a tensor of torch's own is writable
            # and aligned, and matrix products give the same bits only for the same alignment.
            embedding = torch.empty(shape)
            for rows in _parts(*shape):
                embedding.numpy()[rows] = next(parts)
            name = self._members.names[teacher]
            found.append(_verified(embedding, expected, name, self._step))
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

    One collective where everybody learns from everybody, else a message from each teacher. What is
    sent has one more row, which holds the checksum of the others.

    Args:
        store: where the group meets.
        rank: this peer's.
        members: the group.
        teachers: who learns from whom.
        device: where this peer computes.
        timeout: until the group is complete.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        rank: int,
        members: Members,
        teachers: Teachers,
        device: torch.device,
        timeout: timedelta,
    ) -> None:
        self._rank, self._members, self._teachers = rank, members, teachers
        # gloo wants equal shapes: narrower embeddings are padded to the widest.
        self._width = max(CHECKSUM_FLOATS, *members.sizes)
        self._device = device if group.backend == "nccl" else torch.device("cpu")
        dist.init_process_group(
            group.backend,
            store=store,
            rank=rank,
            world_size=len(members.sizes),
            # NCCL's would end the process of whoever waits, amid others' compiling: the driver ends it.
            timeout=timeout if group.backend == "gloo" else _NEVER,
            device_id=device if group.backend == "nccl" else None,
        )
        if group.backend == "gloo":
            dist.distributed_c10d._set_pg_timeout(_NEVER, dist.group.WORLD)
        self._pending: list[Any] = []
        self._received: dict[int, Tensor] = {}
        self._step = -1

    def start(self, step: int, embedding: Tensor) -> None:
        self._step = step
        all_to_all = self._teachers.all_others
        own = self._width if all_to_all else self._width_of(self._rank)
        sent = self._packed(embedding, own)  # what fails here has nothing to do with others
        try:
            if all_to_all:
                self._gather(sent)
            else:
                self._send(sent, self._teachers.at(step))
        except _DIST_ERRORS as error:
            raise self._lost(error) from None

    def finish(self) -> list[Tensor]:
        try:
            # No variable of this frame holds it: a traceback would, and with it the group's sockets.
            while self._pending:
                # A send or receive has the patience of the group's start, unless told otherwise.
                self._pending[0].wait(_NEVER)
                self._pending.pop(0)
        except _DIST_ERRORS as error:
            raise self._lost(error) from None
        found = []
        for teacher, received in self._received.items():
            rows = received[:-1, : self._members.sizes[teacher]].contiguous()
            # A copy, as what is viewed as int64 must start at a multiple of 8 bytes.
            expected = int(received[-1, :CHECKSUM_FLOATS].clone().view(torch.int64))
            found.append(_verified(rows, expected, self._members.names[teacher], self._step))
        return found

    def _lost(self, error: Exception) -> PeerLostError:
        return ExchangeLostError(f"exchange of step {self._step + 1} failed: {_first_line(error)}")

    def _packed(self, embedding: Tensor, width: int) -> Tensor:
        """(B, D) -> (B + 1, width) with the checksum in the last row."""
        num_rows, size = embedding.shape
        packed = torch.zeros(num_rows + 1, width, device=self._device)
        packed[:-1, :size] = embedding
        packed[-1, :CHECKSUM_FLOATS] = checksum(packed[:-1, :size]).view(1).view(torch.float32)
        return packed

    def _width_of(self, rank: int) -> int:
        return max(CHECKSUM_FLOATS, self._members.sizes[rank])

    def _gather(self, sent: Tensor) -> None:
        """From all to all."""
        received = [torch.empty_like(sent) for _ in self._members.sizes]
        self._pending = [dist.all_gather(received, sent, async_op=True)]
        self._received = {n: rows for n, rows in enumerate(received) if n != self._rank}

    def _send(self, sent: Tensor, teachers: Sequence[Sequence[int]]) -> None:
        """To this peer's students, from its teachers."""
        self._received = {
            teacher: torch.empty(len(sent), self._width_of(teacher), device=self._device)
            for teacher in teachers[self._rank]
        }
        self._pending = dist.batch_isend_irecv(
            [
                *(
                    dist.P2POp(dist.isend, sent, student)
                    for student in students(teachers, self._rank)
                ),
                *(
                    dist.P2POp(dist.irecv, rows, teacher)
                    for teacher, rows in self._received.items()
                ),
            ]
        )

    def close(self) -> None:
        self._pending.clear()  # sockets close when nothing refers to the group any more
        leave_group()


def leave_group() -> None:
    """Out of the group of an old generation, also of one that was never complete."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # torch counts groups, also those that could not be formed, and names places in the store by the
    # count: a peer that lives on must count like one that was started anew.
    dist.distributed_c10d._world.group_count = 0


def connect(
    transport: str,
    coordinator: Any,
    rank: int,
    members: Members,
    teachers: Teachers,
    device: torch.device,
    start_timeout_s: float,
) -> tuple[Exchange, str]:
    """A peer's end of the exchange, and the way that was taken, with the reason if not the asked.

    ``direct`` falls back to the coordinator, for all peers alike, where no group can be formed.
    """
    leave_group()
    if len(members.names) == 1:
        return NoExchange(), "none"
    if transport == "coordinator":
        return CoordinatorExchange(coordinator, rank, members, teachers), "coordinator"
    direct: DirectExchange | None = None
    reason = "another peer could not join"
    try:
        direct = _join_group(coordinator, rank, members, teachers, device, start_timeout_s)
    except _DIST_ERRORS as error:
        reason = _first_line(error)
    try:
        do_all = ray.get(coordinator.all_agree.remote(rank, direct is not None))
    except BaseException:
        leave_group()
        raise
    if do_all:
        assert direct is not None
        return direct, "direct"
    leave_group()
    how = f"coordinator, as no direct group could be formed ({reason})"
    return CoordinatorExchange(coordinator, rank, members, teachers), how


def store_at(host: str, timeout: timedelta) -> TCPStore:
    """A store that listens at this address and no other: it does not ask who comes. (TCPStore by itself
    listens at all of them.)"""
    # Port 0: the system picks a free one, and no other process can take it in between.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )


def _join_group(
    coordinator: Any,
    rank: int,
    members: Members,
    teachers: Teachers,
    device: torch.device,
    start_timeout_s: float,
) -> DirectExchange:
    # The driver waits for so long, and there is to be time to fall back.
    timeout = timedelta(seconds=start_timeout_s / 3)
    _use_interface_of(ray.util.get_node_ip_address())
    name = "cpu"
    if device.type == "cuda":
        name = str(torch.cuda.get_device_properties(device).uuid)
    own_store: Store | None = None
    address: tuple[str, int] | None = None
    reason = "the first peer could open no store"
    if rank == 0:
        host = ray.util.get_node_ip_address()
        try:
            own_store = store_at(host, timeout)
            address = (host, own_store.port)
        except _DIST_ERRORS as error:
            reason = f"no store on {host}: {error}"  # said below: the others wait for our offer
    group: Group | None = ray.get(coordinator.form_group.remote(rank, Offer(name, address)))
    if group is None:
        raise RuntimeError(reason)
    store = own_store or TCPStore(*group.store, is_master=False, timeout=timeout)
    return DirectExchange(group, store, rank, members, teachers, device, timeout)


def _use_interface_of(address: str) -> None:
    """Has gloo and NCCL listen where Ray does, unless the environment says where.

    By itself gloo takes the address that the host's name stands for, which on many machines is one
    that no other machine can reach (127.0.1.1).
    """
    for _, interface in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
            asked = struct.pack("256s", interface[:15].encode())
            found = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, asked)
            if socket.inet_ntoa(found[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
                return


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
