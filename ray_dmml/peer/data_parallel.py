"""One peer over several devices of a node: each holds the net and takes an even part of every batch.

The first is the peer itself. It alone has losses, optimiser and state, and sees the embeddings of the
whole batch, so that the losses are those of one big batch. The others are sent the weights whenever
they have changed, and keep nothing that could be lost:

    peer  --weights, images-->  replicas  --embeddings-->  peer: losses
    peer  --gradient of their embeddings-->  replicas: backward  --sum of gradients-->  peer: update

With live BatchNorm each takes the statistics of its own part, and the peer's are kept; dropout draws
anew on each. All else equals the whole batch on one device, to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    ReduceOptions,
    Store,
)

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import ReplicaLostError
from ray_dmml.models.embedding_net import EmbeddingNet, autocast, build_embedding_net, compiled
from ray_dmml.randomness import seeded

_WEIGHTS, _EMBED, _INFER, _BACKWARD = range(4)
_HEADER = 6  # what, which net, rows, height, width, seed

_COMPUTED = 1
"""Tag of the word that a result is there; data has 0."""

_NEVER = timedelta(days=7)
"""A replica waits as long as its peer does: Ray ends it with the peer."""

LOOPBACK = "127.0.0.1"
"""All are on one node, and nobody else's: neither the store nor gloo asks who is there."""


class ReplicaChannel:
    """What the replicas of a peer send each other.

    Args:
        store: where they find each other.
        rank: 0 for the peer.
        size: how many they are, with it.
        device: of this one; tensors travel by NCCL where it is a GPU, else by gloo.
        name: of the peer, for errors.
        timeout_s: until all are there.

    Raises:
        ReplicaLostError: not all came; later, in every call: one of them is gone.
    """

    def __init__(
        self, store: Store, rank: int, size: int, device: torch.device, name: str, timeout_s: float
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._name = name
        with self._told():
            self._connect(store, timeout_s)

    def _connect(self, store: Store, timeout_s: float) -> None:
        gloo: Any = ProcessGroupGloo  # whose types are incomplete
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=timeout_s)
        # Headers are read on the CPU, and a wait of a GPU for the next one would be a busy one.
        self._control: Any = ProcessGroupGloo(
            PrefixStore("control", store), self.rank, self.size, options
        )
        self._control.set_timeout(_NEVER)
        self._data: Any = self._control
        if self.device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            nccl = ProcessGroupNCCL.Options()
            nccl._timeout = _NEVER
            self._data = ProcessGroupNCCL(PrefixStore("data", store), self.rank, self.size, nccl)

    def header(self, *values: int) -> list[int]:
        """From the peer to all; the others give none and receive it."""
        sent = torch.zeros(_HEADER, dtype=torch.int64)
        sent[: len(values)] = torch.tensor(values, dtype=torch.int64)
        with self._told():
            self._control.broadcast(sent, 0).wait()
        return [int(value) for value in sent]

    def broadcast(self, tensor: Tensor) -> None:
        with self._told():
            self._data.broadcast(tensor, 0).wait()

    def send(self, parts: Iterable[tuple[int, Tensor]]) -> Callable[[], None]:
        """To each rank its part, where it has one; the result waits until all are sent."""
        kept = [(rank, part.contiguous()) for rank, part in parts if len(part)]
        with self._told():
            works = [self._data.send([part], rank, 0) for rank, part in kept]

        def wait() -> None:
            with self._told():
                for work in works:
                    self._wait(work)
            kept.clear()  # until then what is sent must stay

        return wait

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        if len(tensor):
            with self._told():
                self._wait(self._data.recv([tensor], rank, 0))
        return tensor

    def sum_up(self, tensor: Tensor) -> None:
        """The sum over all, in the peer's tensor."""
        options = ReduceOptions()
        options.reduceOp, options.rootRank = ReduceOp.SUM, 0
        with self._told():
            self._data.reduce([tensor], options).wait()

    def computed(self) -> None:
        """A replica has its next result. NCCL does not hear of a process that is gone or out of memory:
        who waits for it in a kernel waits for ever, so the peer starts none before it is told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._told():
            self._control.send([torch.zeros(1)], 0, _COMPUTED).wait(_NEVER)

    def until_computed(self, rank: int) -> None:
        """The peer's end of :meth:`computed`."""
        with self._told():
            self._control.recv([torch.zeros(1)], rank, _COMPUTED).wait(_NEVER)

    def _wait(self, work: Any) -> None:
        """gloo's sends and receives have the group's first patience unless they are given another;
        NCCL's would block the CPU, and have none of their own."""
        if self._data is self._control:
            work.wait(_NEVER)
        else:
            work.wait()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ReplicaLostError(f"{self._name}: one of its replicas was lost ({why})") from None


class Replicas:
    """The peer's end.

    Args:
        channel: rank 0 of it.
    """

    def __init__(self, channel: ReplicaChannel) -> None:
        self._channel = channel
        self._sent: dict[int, tuple[int, ...]] = {}  # versions of the weights they have
        self._own: Tensor | None = None
        self._whole: Tensor | None = None

    def embed(self, forward: Any, net: torch.nn.Module, images: Tensor) -> Tensor:
        """The embeddings of a batch that is learned from: (B, 3, H, W) uint8 -> (B, D) float32 before
        normalisation, which ask for a gradient.

        Args:
            forward: the net's pass, which may be compiled.
            net: whose weights they get.

        Raises:
            ReplicaLostError: a replica is gone.
        """
        self._send_weights(net, 0)
        own, sent = self._hand_out(_EMBED, 0, images)
        self._own = forward(own)
        parts = [self._own.detach(), *self._collect(len(images), self._own)]
        sent()
        self._whole = torch.cat(parts).requires_grad_()
        return self._whole

    def infer(self, net: EmbeddingNet, images: Tensor, *, ema: bool) -> Tensor:
        """The same without gradients, in evaluation mode.

        Args:
            ema: the net is the average of the one that learns.

        Raises:
            ReplicaLostError: a replica is gone.
        """
        self._send_weights(net, int(ema))
        own_images, sent = self._hand_out(_INFER, int(ema), images)
        own = net.forward_unnormalized(own_images)
        parts = [own, *self._collect(len(images), own)]
        sent()
        return torch.cat(parts)

    def backward(self, net: torch.nn.Module) -> None:
        """From the gradient of what :meth:`embed` gave to those of the weights, which are added up.

        Raises:
            ReplicaLostError: a replica is gone.
        """
        assert self._own is not None and self._whole is not None and self._whole.grad is not None
        gradient, own = self._whole.grad, self._own
        self._whole = self._own = None
        self._channel.header(_BACKWARD)
        mine, *others = _parts(gradient, self._channel.size)
        sent = self._channel.send(enumerate(others, start=1))
        learned = [p for p in net.parameters() if p.requires_grad]
        found = torch.autograd.grad(own, learned, mine, allow_unused=True)
        sent()
        total = _flat(found, learned)
        for rank in range(1, self._channel.size):
            self._channel.until_computed(rank)
        self._channel.sum_up(total)
        pieces = total.split([p.numel() for p in learned])
        for parameter, is_used, piece in zip(learned, found, pieces, strict=True):
            if is_used is None:
                continue
            if parameter.grad is None:  # in the parameter's own layout
                parameter.grad = torch.empty_like(parameter).copy_(piece.view_as(parameter))
            else:
                parameter.grad += piece.view_as(parameter)

    def _send_weights(self, net: torch.nn.Module, which: int) -> None:
        """Where they have changed: torch counts the changes of every tensor."""
        tensors = _weights(net)
        versions = tuple(tensor._version for tensor in tensors)
        if self._sent.get(which) == versions:
            return
        self._sent.pop(which, None)
        self._channel.header(_WEIGHTS, which)
        for dtype in sorted({str(tensor.dtype) for tensor in tensors}):
            same = [tensor.detach().reshape(-1) for tensor in tensors if str(tensor.dtype) == dtype]
            self._channel.broadcast(torch.cat(same))
        self._sent[which] = versions

    def _hand_out(self, what: int, which: int, images: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Their parts of a batch to the others; the own part, and the wait until all are sent."""
        height, width = images.shape[2:]
        seed = torch.initial_seed() & (2**63 - 1)  # an int64
        self._channel.header(what, which, len(images), height, width, seed)
        own, *others = _parts(images, self._channel.size)
        return own, self._channel.send(enumerate(others, start=1))

    def _collect(self, num_rows: int, like: Tensor) -> list[Tensor]:
        found = []
        for rank, size in enumerate(_sizes(num_rows, self._channel.size)[1:], start=1):
            if size:
                self._channel.until_computed(rank)
            found.append(self._channel.receive(like.new_empty(size, like.shape[1]), rank))
        return found


class Replica:
    """One of the others: a copy of the net that does as it is told.

    Args:
        config: the peer's.
        run_seed: the run's.
        channel: its end.
    """

    def __init__(self, config: PeerConfig, run_seed: int, channel: ReplicaChannel) -> None:
        self._config, self._channel = config, channel
        net = build_embedding_net(config, run_seed, initial_weights=False).to(channel.device)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self._nets = {0: net.to(memory_format=layout)}
        if config.ema is not None:
            self._nets[1] = copy.deepcopy(net)
        name = f"{config.name}, replica {channel.rank}"
        self._forward = (
            compiled(net, name, channel.device) if config.compile else net.forward_unnormalized
        )
        self._embedding: Tensor | None = None

    def serve(self) -> None:
        """Without end: its process ends with the peer's.

        Raises:
            ReplicaLostError: the peer, or another of its replicas, is gone.
        """
        while True:
            self.serve_one()

    def serve_one(self) -> None:
        """What it is asked for next."""
        what, which, *rest = self._channel.header()
        if what == _WEIGHTS:
            self._take_weights(which)
        elif what == _BACKWARD:
            self._backward()
        else:
            self._embed(what, which, *rest)

    def _take_weights(self, which: int) -> None:
        tensors = _weights(self._nets[which])
        for dtype in sorted({str(tensor.dtype) for tensor in tensors}):
            same = [tensor for tensor in tensors if str(tensor.dtype) == dtype]
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
            self._channel.broadcast(flat)
            with torch.no_grad():
                for tensor, piece in zip(same, flat.split([t.numel() for t in same]), strict=True):
                    tensor.copy_(piece.view_as(tensor))

    def _embed(self, what: int, which: int, rows: int, height: int, width: int, seed: int) -> None:
        learns = what == _EMBED
        if learns:  # else what was embedded last may still be waiting for its gradient
            self._embedding = None
        size = _sizes(rows, self._channel.size)[self._channel.rank]
        if not size:
            return
        shape = (size, 3, height, width)
        images = torch.empty(shape, dtype=torch.uint8, device=self._channel.device)
        self._channel.receive(images, 0)
        net = self._nets[which]
        net.train(learns)
        with (
            seeded(seed, self._channel.rank),
            autocast(self._config.amp, self._channel.device),
            nullcontext() if learns else torch.no_grad(),
        ):
            found = self._forward(images) if learns else net.forward_unnormalized(images)
        if learns:
            self._embedding = found
        self._channel.computed()
        self._channel.send([(0, found.detach())])()

    def _backward(self) -> None:
        learned = [p for p in self._nets[0].parameters() if p.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(learned)
        if self._embedding is not None:
            gradient = self._channel.receive(torch.empty_like(self._embedding), 0)
            found = torch.autograd.grad(self._embedding, learned, gradient, allow_unused=True)
        self._embedding = None
        total = _flat(found, learned)
        self._channel.computed()
        self._channel.sum_up(total)


def _sizes(num_rows: int, num_parts: int) -> list[int]:
    """As even as can be; the first are the larger."""
    return [num_rows // num_parts + (n < num_rows % num_parts) for n in range(num_parts)]


def _parts(rows: Tensor, num_parts: int) -> Sequence[Tensor]:
    return rows.split(_sizes(len(rows), num_parts))


def _weights(net: torch.nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """All in a row; zeros for what was not used."""
    return torch.cat(
        [
            torch.zeros_like(parameter).reshape(-1) if found is None else found.reshape(-1)
            for found, parameter in zip(gradients, parameters, strict=True)
        ]
    )
