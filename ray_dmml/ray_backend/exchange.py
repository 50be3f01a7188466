"""How the embeddings of a peer actor reach the other peers: from peer to peer, or through the coordinator.

Both ways give the same bits. ``start`` returns at once and ``finish`` waits, so that the peer computes its metric
loss while the bytes travel. :mod:`~ray_dmml.ray_backend.rendezvous` decides which way a generation takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from ray_dmml.cohort.teachers import Teachers, students
from ray_dmml.errors import ExchangeLostError, PeerLostError
from ray_dmml.ray_backend.coordinator import Group

INLINE_PART_BYTES = 96 * 1024
"""Just below Ray's limit of 100 KiB, header included, for an argument that travels inside a call."""

CHECKSUM_FLOATS = 2
"""Number of float32 values that hold the int64 checksum."""

INLINE_EMBEDDING_BYTES = 2**20
"""Larger embeddings go through Ray's object store in one piece."""

DIST_ERRORS = (RuntimeError, ValueError, OSError)
"""What torch.distributed raises."""

_NEVER = timedelta(days=7)
"""Waits inside a group have no deadline of their own: the driver ends peers that keep others waiting."""


def checksum(rows: Tensor) -> Tensor:
    """int64 scalar of (N, D) float32 rows, on their device. Any changed or moved bit changes it."""
    bits = rows.contiguous().view(torch.int32).flatten().to(torch.int64)
    weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd weights hide no bit
    return (bits * weights).sum()  # wraps around in the same way everywhere


def verify(rows: Tensor, expected: int, teacher: str, step: int) -> Tensor:
    """Returns the rows. Raises PeerLostError if they are not the ones that were sent."""
    if int(checksum(rows)) != expected:
        raise PeerLostError(f"the embeddings of {teacher} at step {step + 1} were damaged on their way")
    return rows


@dataclass(frozen=True)
class Members:
    """The peers of a generation in peer order. A peer's rank is its position."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Their embedding sizes D."""


class Exchange(Protocol):
    """One peer's end of the exchange."""

    def start(self, step: int, embedding: Tensor) -> None:
        """Sends (B, D) float32 embeddings of a step without waiting."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...

    def finish(self) -> list[Tensor]:
        """Waits for the (B, D_n) float32 embeddings of this peer's teachers, in peer order.

        Raises:
            PeerLostError: they did not arrive, or are not the ones that were sent.
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
    """The coordinator carries the embeddings, as numpy arrays; torch tensors take Ray three times as long."""

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
        if count == 1:  # this peer has no teacher at this step
            self._pending = [self._pending]

    def finish(self) -> list[Tensor]:
        checksums, *rest = ray.get(self._pending)
        parts = iter(rest)
        embeddings = []
        for teacher, expected in zip(self._expected, checksums, strict=True):
            shape = (self._num_rows, self._members.sizes[teacher])
            # Ray's arrays are read-only views at any address. A tensor of torch's own is writable and
            # aligned, and matrix products give the same bits only for the same alignment.
            embedding = torch.empty(shape)
            for rows in _parts(*shape):
                embedding.numpy()[rows] = next(parts)
            name = self._members.names[teacher]
            embeddings.append(verify(embedding, expected, name, self._step))
        return embeddings

    def close(self) -> None:
        pass


def _parts(num_rows: int, size: int) -> list[slice]:
    """Blocks of rows of (N, D) float32 embeddings that travel inside a call of an actor.

    Ray sends a larger argument or result through the object store, which takes longer than copying it.
    Very large embeddings go there all the same, in one piece.
    """
    if num_rows * size * 4 > INLINE_EMBEDDING_BYTES:
        return [slice(0, num_rows)]
    block = max(1, INLINE_PART_BYTES // (size * 4))
    return [slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block)]


class DirectExchange:
    """A torch.distributed group of the peer actors, formed by the coordinator.

    It uses one collective if every peer learns from all others, and messages between pairs of peers
    otherwise. What is sent has one more row, which holds the checksum of the rows before it.

    Args:
        store: where the group meets.
        rank: rank of this peer.
        members: the peers of the group.
        teachers: who learns from whom.
        device: device of this peer.
        timeout: the longest wait for the group to be complete.
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
        # gloo needs equal shapes, so narrower embeddings are padded to the widest.
        self._width = max(CHECKSUM_FLOATS, *members.sizes)
        self._device = device if group.backend == "nccl" else torch.device("cpu")
        dist.init_process_group(
            group.backend,
            store=store,
            rank=rank,
            world_size=len(members.sizes),
            # A timeout of NCCL's ends the waiting process, also while another peer compiles its net.
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
        sent = self.pack(embedding, own)  # outside the try: its errors are not those of other peers
        try:
            if all_to_all:
                self._gather(sent)
            else:
                self._send(sent, self._teachers.at(step))
        except DIST_ERRORS as error:
            raise self._lost(error) from None

    def finish(self) -> list[Tensor]:
        try:
            # No local variable holds the work: a traceback would keep it, and with it the group's sockets.
            while self._pending:
                # Without an argument a send or receive has the timeout of the group's start.
                self._pending[0].wait(_NEVER)
                self._pending.pop(0)
        except DIST_ERRORS as error:
            raise self._lost(error) from None
        embeddings = []
        for teacher, received in self._received.items():
            rows = received[:-1, : self._members.sizes[teacher]].contiguous()
            # A copy, because a view as int64 must start at a multiple of 8 bytes.
            expected = int(received[-1, :CHECKSUM_FLOATS].clone().view(torch.int64))
            embeddings.append(verify(rows, expected, self._members.names[teacher], self._step))
        return embeddings

    def _lost(self, error: Exception) -> PeerLostError:
        return ExchangeLostError(f"exchange of step {self._step + 1} failed: {first_line(error)}")

    def pack(self, embedding: Tensor, width: int) -> Tensor:
        """(B, D) -> (B + 1, width) with the checksum in the last row: what is sent."""
        num_rows, size = embedding.shape
        packed = torch.zeros(num_rows + 1, width, device=self._device)
        packed[:-1, :size] = embedding
        packed[-1, :CHECKSUM_FLOATS] = checksum(packed[:-1, :size]).view(1).view(torch.float32)
        return packed

    def _width_of(self, rank: int) -> int:
        return max(CHECKSUM_FLOATS, self._members.sizes[rank])

    def _gather(self, sent: Tensor) -> None:
        """Sends to all peers and receives from all."""
        received = [torch.empty_like(sent) for _ in self._members.sizes]
        self._pending = [dist.all_gather(received, sent, async_op=True)]
        self._received = {n: rows for n, rows in enumerate(received) if n != self._rank}

    def _send(self, sent: Tensor, teachers: Sequence[Sequence[int]]) -> None:
        """Sends to this peer's students and receives from its teachers."""
        self._received = {
            teacher: torch.empty(len(sent), self._width_of(teacher), device=self._device)
            for teacher in teachers[self._rank]
        }
        self._pending = dist.batch_isend_irecv(
            [
                *(dist.P2POp(dist.isend, sent, student) for student in students(teachers, self._rank)),
                *(dist.P2POp(dist.irecv, rows, teacher) for teacher, rows in self._received.items()),
            ]
        )

    def close(self) -> None:
        self._pending.clear()  # the sockets close when nothing refers to the group any more
        leave_group()


def leave_group() -> None:
    """Leaves the group of an old generation, also one that was never complete."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # torch counts groups, also those that could not be formed, and the count is part of their keys in the
    # store. A peer that lives on must count like one that has just started.
    dist.distributed_c10d._world.group_count = 0


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
