"""How the embeddings of a peer actor reach the other peers: from peer to peer, or through the coordinator.

Both ways give the same bits. ``start`` returns at once and ``finish`` waits, so that the peer computes its metric
loss while the bytes travel. :mod:`~ray_dmml.ray_backend.rendezvous` decides which way a generation takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from ray_dmml.cohort.teachers import Teachers, students
from ray_dmml.errors import ExchangeLostError, PeerLostError
from ray_dmml.ray_backend.failures import first_line

DIST_ERRORS = (RuntimeError, ValueError, OSError)  # what torch.distributed raises

_CHECKSUM_FLOATS = 2  # float32 values that hold the int64 checksum
_NEVER = timedelta(days=7)  # the driver ends peers that keep others waiting


def checksum(rows: Tensor) -> Tensor:
    """int64 scalar of (N, D) float32 rows, on their device. Any changed or moved bit changes it."""
    bits = rows.contiguous().flatten()
    if len(bits) % 2:
        bits = torch.cat([bits, bits.new_zeros(1)])
    elif bits.storage_offset() % 2:  # a view as int64 must start at a multiple of 8 bytes
        bits = bits.clone()
    words = bits.view(torch.int64)
    return (words * _odd_numbers(len(words), words.device)).sum()  # wraps around in the same way everywhere


@lru_cache(maxsize=8)
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """Weights that hide no bit: modulo 2^64, every odd number has an inverse."""
    return torch.arange(1, 2 * count, 2, device=device)


def verify(rows: Tensor, expected: int, teacher: str, step: int) -> Tensor:
    """Returns the rows. Raises PeerLostError if they are not the ones that were sent."""
    if int(checksum(rows)) != expected:
        raise PeerLostError(f"the embeddings of {teacher} at step {step + 1} were damaged on their way")
    return rows


@dataclass(frozen=True)
class Member:
    """One peer among the others of its generation. ``names`` are those of all peers. A peer's rank is its position
    there."""

    rank: int
    device: torch.device
    names: tuple[str, ...]
    teachers: Teachers
    coordinator: Any

    def embedding_sizes(self, own: int) -> list[int]:
        """D of every peer, once all of them have called this. A frozen peer's is known when its weights are loaded."""
        sizes: list[int] = ray.get(self.coordinator.gather.remote("embedding sizes", self.rank, own))
        return sizes


class Exchange:
    """One peer's end of the exchange. This class is that of a cohort of one, which exchanges nothing."""

    def start(self, step: int, embedding: Tensor) -> None:
        """Sends (B, D) float32 embeddings of a step without waiting."""

    def finish(self) -> list[Tensor]:
        """Waits for the (B, D_n) float32 embeddings of this peer's teachers, in peer order.

        Raises:
            PeerLostError: they did not arrive, or are not the ones that were sent.
        """
        return []

    def close(self) -> None:
        """Leaves the group."""


class CoordinatorExchange(Exchange):
    """The coordinator carries the embeddings, as numpy arrays; torch tensors take Ray three times as long."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._sizes: list[int] = []  # known from the first step on

    def start(self, step: int, embedding: Tensor) -> None:
        member, array = self._member, embedding.cpu().numpy()
        teachers = list(member.teachers.at(step)[member.rank])
        self._step = step
        self._sizes = self._sizes or member.embedding_sizes(array.shape[1])
        self._shapes = {teacher: (len(array), self._sizes[teacher]) for teacher in teachers}
        count = 1 + sum(len(_parts(*shape)) for shape in self._shapes.values())
        parts = [array[rows] for rows in _parts(*array.shape)]
        call = member.coordinator.exchange.options(num_returns=count)
        self._pending = call.remote(step, member.rank, teachers, int(checksum(embedding)), *parts)

    def finish(self) -> list[Tensor]:
        checksums, *rest = ray.get(self._pending)
        parts = iter(rest)
        embeddings = []
        for (teacher, shape), expected in zip(self._shapes.items(), checksums, strict=True):
            # Ray's arrays are read-only views at any address. A tensor of torch's own is writable and
            # aligned, and matrix products give the same bits only for the same alignment.
            embedding = torch.empty(shape)
            for rows in _parts(*shape):
                embedding.numpy()[rows] = next(parts)
            embeddings.append(verify(embedding, expected, self._member.names[teacher], self._step))
        return embeddings


def _parts(num_rows: int, size: int) -> list[slice]:
    """Blocks of rows of (N, D) float32 embeddings that travel inside a call of an actor.

    Ray sends an argument or result above 100 KiB, header included, through the object store, which takes longer
    than copying it. Embeddings above 1 MiB go there all the same, in one piece.
    """
    if num_rows * size * 4 > 2**20:
        return [slice(0, num_rows)]
    block = max(1, 96 * 1024 // (size * 4))
    return [slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block)]


class DirectExchange(Exchange):
    """A torch.distributed group of the peer actors, which meets at a store within ``timeout``.

    It uses one collective if every peer learns from all others, and messages between pairs of peers
    otherwise. What is sent has one more row, which holds the checksum of the rows before it.
    """

    def __init__(self, member: Member, backend: str, store: Store, timeout: timedelta) -> None:
        self._member = member
        is_gloo = backend == "gloo"
        self._device = torch.device("cpu") if is_gloo else member.device
        self._sizes: list[int] = []  # known from the first step on
        self._widths: list[int] = []
        dist.init_process_group(
            backend,
            store=store,
            rank=member.rank,
            world_size=len(member.names),
            # A timeout of NCCL's ends the waiting process, also while another peer compiles its net.
            timeout=timeout if is_gloo else _NEVER,
            device_id=None if is_gloo else member.device,
        )
        if is_gloo:
            dist.distributed_c10d._set_pg_timeout(_NEVER, dist.group.WORLD)
        self._pending: list[Any] = []

    def start(self, step: int, embedding: Tensor) -> None:
        self._step, rank = step, self._member.rank
        if not self._sizes:
            self._learn_sizes(embedding.shape[1])
        teachers = self._member.teachers.at(step)
        sent = self.pack(embedding, self._widths[rank])  # outside the block: its errors are not those of other peers
        self._received = {n: torch.empty(len(sent), self._widths[n], device=self._device) for n in teachers[rank]}
        with self._explain_loss():
            if self._member.teachers.all_others:
                rows = self._received | {rank: torch.empty_like(sent)}
                self._pending = [dist.all_gather([rows[n] for n in sorted(rows)], sent, async_op=True)]
            else:
                sends = [dist.P2POp(dist.isend, sent, student) for student in students(teachers, rank)]
                receives = [dist.P2POp(dist.irecv, tensor, teacher) for teacher, tensor in self._received.items()]
                self._pending = dist.batch_isend_irecv([*sends, *receives])

    def finish(self) -> list[Tensor]:
        # No local variable holds the work: a traceback would keep it, and with it the group's sockets.
        with self._explain_loss():
            while self._pending:
                # Without an argument a send or receive has the timeout of the group's start.
                self._pending[0].wait(_NEVER)
                self._pending.pop(0)
        embeddings = []
        for teacher, received in self._received.items():
            rows = received[:-1, : self._sizes[teacher]].contiguous()
            # A copy, because a view as int64 must start at a multiple of 8 bytes.
            expected = int(received[-1, :_CHECKSUM_FLOATS].clone().view(torch.int64))
            embeddings.append(verify(rows, expected, self._member.names[teacher], self._step))
        return embeddings

    def _learn_sizes(self, own: int) -> None:
        self._sizes = self._member.embedding_sizes(own)
        # gloo needs equal shapes in a collective, so narrower embeddings are padded to the widest.
        widest = [max(self._sizes)] * len(self._sizes)
        sizes = widest if self._member.teachers.all_others else self._sizes
        self._widths = [max(_CHECKSUM_FLOATS, size) for size in sizes]

    @contextmanager
    def _explain_loss(self) -> Iterator[None]:
        try:
            yield
        except DIST_ERRORS as error:
            raise ExchangeLostError(f"exchange of step {self._step + 1} failed: {first_line(error)}") from None

    def pack(self, embedding: Tensor, width: int) -> Tensor:
        """(B, D) -> (B + 1, width) with the checksum in the last row: what is sent."""
        num_rows, size = embedding.shape
        packed = torch.zeros(num_rows + 1, width, device=self._device)
        packed[:-1, :size] = embedding
        packed[-1, :_CHECKSUM_FLOATS] = checksum(packed[:-1, :size]).view(1).view(torch.float32)
        return packed

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
