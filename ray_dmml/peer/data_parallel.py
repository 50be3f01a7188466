"""One peer on several devices of a node: each holds the net and takes an even part of every batch.

The first device is the peer itself. Only the peer has losses, an optimiser and state. It gets the
embeddings of the whole batch, so the losses are those of one large batch. The others are replicas. They
receive the weights whenever these have changed, and have no state that could be lost:

    peer  --weights, images-->  replicas  --embeddings-->  peer: losses
    peer  --gradient of their embeddings-->  replicas: backward  --sum of gradients-->  peer: update

With ``batch_norm: train`` each replica normalises with the statistics of its own part, and the peer keeps
its own statistics. Dropout differs between replicas. Everything else equals the whole batch on one device
up to rounding. With ``data.micro_batch`` each process embeds its part in micro batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import PrefixStore, ProcessGroupGloo, ReduceOp, ReduceOptions, Store  # type: ignore[attr-defined]

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import ReplicaLostError
from ray_dmml.models.checkpointing import checkpoint_activations
from ray_dmml.models.embedding_net import EmbeddingNet, autocast, build_embedding_net
from ray_dmml.models.lora import add_adapters
from ray_dmml.peer.training_pass import Backward, TrainingPass
from ray_dmml.randomness import seeded

_WEIGHTS, _EMBED, _INFER, _FEATURES, _BACKWARD = range(5)
_HEADER_SIZE = 6  # command, net (0 the trained one, 1 the averaged one), rows or head size, height, width, seed
_COMPUTED = 1  # tag of the message that a result is ready; data has the tag 0
_NEVER = timedelta(days=7)  # a replica waits as long as its peer lives; Ray ends both together

LOOPBACK = "127.0.0.1"
"""Other hosts must not reach the processes: neither the store nor gloo authenticates anybody."""


class ReplicaChannel:
    """Connects a peer and its replicas.

    Args:
        store: the rendezvous of all processes.
        rank: 0 for the peer, 1 and more for its replicas.
        size: number of processes with the peer.
        device: device of this process. Tensors are sent by NCCL if it is a GPU, else by gloo.
        name: the peer's name, for errors.
        timeout_s: seconds in which all processes must connect.

    Raises:
        ReplicaLostError: not all processes connected in time. Every method raises it when one is gone.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, name: str, timeout_s: float) -> None:
        self.rank, self.size, self.device, self._name = rank, size, device, name
        with self._errors():
            gloo: Any = ProcessGroupGloo  # whose types are incomplete
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=LOOPBACK)]
            options._timeout = timedelta(seconds=timeout_s)
            # Headers are sent between CPUs: a GPU that waits for the next header would be busy.
            self._control: Any = ProcessGroupGloo(PrefixStore("control", store), rank, size, options)
            self._control.set_timeout(_NEVER)
            self._data: Any = self._control
            if device.type == "cuda":
                from torch.distributed import ProcessGroupNCCL

                nccl = ProcessGroupNCCL.Options()
                nccl._timeout = _NEVER
                self._data = ProcessGroupNCCL(PrefixStore("data", store), rank, size, nccl)

    def header(self, *values: int) -> list[int]:
        """Sends the peer's values to all replicas. A replica passes no values and receives them."""
        header = torch.tensor([*values, *[0] * (_HEADER_SIZE - len(values))], dtype=torch.int64)
        with self._errors():
            self._control.broadcast(header, 0).wait()
        return [int(value) for value in header]

    def broadcast(self, tensor: Tensor) -> None:
        """Copies the peer's tensor into those of all replicas."""
        with self._errors():
            self._data.broadcast(tensor, 0).wait()

    def send(self, parts: Iterable[tuple[int, Tensor]]) -> Callable[[], None]:
        """Starts to send a part to each rank, except empty ones. Call the result to wait until all are sent."""
        in_flight = [(rank, part.contiguous()) for rank, part in parts if len(part)]
        with self._errors():
            works = [self._data.send([part], rank, 0) for rank, part in in_flight]

        def wait() -> None:
            with self._errors():
                for work in works:
                    self._wait(work)
            in_flight.clear()  # the tensors must live until they are sent

        return wait

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """Fills a tensor with what a rank sends, unless it is empty, and returns it."""
        if len(tensor):
            with self._errors():
                self._wait(self._data.recv([tensor], rank, 0))
        return tensor

    def sum_up(self, tensor: Tensor) -> None:
        """Writes the sum over all processes into the peer's tensor."""
        options = ReduceOptions()
        options.reduceOp, options.rootRank = ReduceOp.SUM, 0
        with self._errors():
            self._data.reduce([tensor], options).wait()

    def computed(self) -> None:
        """Reports that the next result of this replica is ready.

        NCCL does not notice that a process is gone or out of memory, and a kernel that waits for it never
        ends. So the peer starts no kernel before this message.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._errors():
            self._control.send([torch.zeros(1)], 0, _COMPUTED).wait(_NEVER)

    def until_computed(self, rank: int) -> None:
        """Waits in the peer for the :meth:`computed` of a replica."""
        with self._errors():
            self._control.recv([torch.zeros(1)], rank, _COMPUTED).wait(_NEVER)

    def _wait(self, work: Any) -> None:
        # Without a timeout gloo takes that of the connection. With one NCCL would block the CPU.
        work.wait(*([_NEVER] if self._data is self._control else []))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ReplicaLostError(f"{self._name}: one of its replicas was lost ({why})") from None


class Replicas:
    """The replicas of a peer, as the peer uses them. Every method raises ReplicaLostError when one is gone."""

    def __init__(self, channel: ReplicaChannel) -> None:
        self._channel = channel
        self._sent_versions: dict[int, tuple[int, ...]] = {}

    def embed(self, own_pass: TrainingPass, net: EmbeddingNet, images: Tensor) -> tuple[Tensor, Backward]:
        """Embeds a training batch as :meth:`TrainingPass.embed` does. ``own_pass`` embeds the peer's own part of it."""
        own_backward: list[Backward] = []

        def embed_own(own_images: Tensor) -> Tensor:
            embeddings, backward = own_pass.embed(own_images)
            own_backward.append(backward)
            return embeddings

        embeddings = self._share(_EMBED, 0, embed_own, net, images)
        return embeddings, lambda gradient: self._backward(net, own_backward[0], gradient)

    def infer(self, net: EmbeddingNet, images: Tensor, *, ema: bool, features: bool = False) -> Tensor:
        """Embeds images without gradients in evaluation mode; ``ema``: the net holds the averaged weights.
        ``features``: the result is (B, F), before the head."""
        if features:
            return self._share(_FEATURES, int(ema), net.backbone_features, net, images)
        return self._share(_INFER, int(ema), net.forward_unnormalized, net, images)

    def _backward(self, net: nn.Module, own_backward: Backward, gradient: Tensor) -> None:
        """Adds the sum of all processes' gradients to ``.grad`` of the net's parameters."""
        self._channel.header(_BACKWARD)
        own_gradient, *others = gradient.tensor_split(self._channel.size)
        wait_sent = self._channel.send(enumerate(others, start=1))
        trainable = [p for p in net.parameters() if p.requires_grad]
        gradients = _gradients(own_backward, own_gradient, trainable)
        wait_sent()
        total = _flat(gradients, trainable)
        for rank in range(1, self._channel.size):
            self._channel.until_computed(rank)
        self._channel.sum_up(total)
        pieces = total.split([p.numel() for p in trainable])
        for parameter, own_part, piece in zip(trainable, gradients, pieces, strict=True):
            if own_part is None:  # the loss does not depend on this parameter
                continue
            if parameter.grad is None:  # with the memory layout of the parameter
                parameter.grad = torch.empty_like(parameter).copy_(piece.view_as(parameter))
            else:
                parameter.grad += piece.view_as(parameter)

    def _send_weights(self, net: EmbeddingNet, which: int) -> None:
        """Sends the weights if they have changed. torch counts the changes of every tensor."""
        tensors = [*net.parameters(), *net.buffers()]
        versions = tuple(tensor._version for tensor in tensors)
        if self._sent_versions.get(which) == versions:
            return
        self._sent_versions.pop(which, None)
        self._channel.header(_WEIGHTS, which, net.head_size)
        for _, flat in _flat_by_dtype(tensors):
            self._channel.broadcast(flat)
        self._sent_versions[which] = versions

    def _share(
        self, command: int, which: int, forward: Callable[[Tensor], Tensor], net: EmbeddingNet, images: Tensor
    ) -> Tensor:
        """Embeds a batch on all devices, the peer's own part by ``forward``."""
        self._send_weights(net, which)
        channel = self._channel
        seed = torch.initial_seed() & (2**63 - 1)  # an int64
        channel.header(command, which, len(images), *images.shape[2:], seed)
        own_images, *others = images.tensor_split(channel.size)
        wait_sent = channel.send(enumerate(others, start=1))
        own = forward(own_images)
        parts = [own]
        for rank, other in enumerate(others, start=1):
            if len(other):
                channel.until_computed(rank)
            parts.append(channel.receive(own.new_empty(len(other), own.shape[1]), rank))
        wait_sent()
        return torch.cat(parts)


class Replica:
    """A copy of a peer's net in another process, which executes the commands of the peer."""

    def __init__(
        self, config: PeerConfig, run_seed: int, channel: ReplicaChannel, micro_batch: int | None = None
    ) -> None:
        self._config, self._channel = config, channel
        net = build_embedding_net(config, run_seed, initial_weights=False)
        add_adapters(net, config, run_seed)
        checkpoint_activations(net.backbone, config)
        net.to(channel.device)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self._nets = {0: net.to(memory_format=layout)}
        if config.ema is not None:
            self._nets[1] = copy.deepcopy(net)
        name = f"{config.name}, replica {channel.rank}"
        self._pass = TrainingPass(config, self._nets[0], micro_batch, name)
        self._embedded: tuple[Tensor, Backward] | None = None  # of the last training batch

    def serve(self) -> None:
        """Executes commands until the peer or another replica is gone, which raises ReplicaLostError."""
        while True:
            command, which, *rest = self._channel.header()
            if command == _WEIGHTS:
                self._receive_weights(which, head_size=rest[0])
            elif command == _BACKWARD:
                self._backward()
            else:
                self._embed(command, which, *rest)

    def _receive_weights(self, which: int, head_size: int) -> None:
        net = self._nets[which]
        if net.frozen:
            net.resize_head(head_size)
        for tensors, flat in _flat_by_dtype([*net.parameters(), *net.buffers()]):
            self._channel.broadcast(flat)
            pieces = flat.split([tensor.numel() for tensor in tensors])
            with torch.no_grad():
                for tensor, piece in zip(tensors, pieces, strict=True):
                    tensor.copy_(piece.view_as(tensor))

    def _embed(self, command: int, which: int, rows: int, height: int, width: int, seed: int) -> None:
        trains = command == _EMBED
        if trains:  # else the last training batch may still wait for its gradient
            self._embedded = None
        # As tensor_split divides the batch.
        size = rows // self._channel.size + (self._channel.rank < rows % self._channel.size)
        if not size:
            return
        images = torch.empty((size, 3, height, width), dtype=torch.uint8, device=self._channel.device)
        self._channel.receive(images, 0)
        net = self._nets[which].train(trains)
        with seeded(seed, self._channel.rank):
            if trains:
                self._embedded = self._pass.embed(images)
                embeddings = self._embedded[0]
            else:
                forward = net.backbone_features if command == _FEATURES else net.forward_unnormalized
                with torch.no_grad(), autocast(self._config.amp, self._channel.device):
                    embeddings = forward(images)
        self._channel.computed()
        self._channel.send([(0, embeddings)])()

    def _backward(self) -> None:
        trainable = [p for p in self._nets[0].parameters() if p.requires_grad]
        gradients: Sequence[Tensor | None] = [None] * len(trainable)
        if self._embedded is not None:
            embeddings, backward = self._embedded
            gradients = _gradients(backward, self._channel.receive(torch.empty_like(embeddings), 0), trainable)
        self._embedded = None
        total = _flat(gradients, trainable)
        self._channel.computed()
        self._channel.sum_up(total)


def _gradients(backward: Backward, gradient: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """What a backward pass adds to ``.grad`` of the parameters; None where the loss does not depend on one."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward(gradient)
    found = [parameter.grad for parameter in parameters]
    for parameter, old in zip(parameters, before, strict=True):
        parameter.grad = old
    return found


def _flat_by_dtype(tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The tensors of each dtype, and a vector of their values."""
    for dtype in sorted({str(tensor.dtype) for tensor in tensors}):
        same = [tensor for tensor in tensors if str(tensor.dtype) == dtype]
        yield same, torch.cat([tensor.detach().reshape(-1) for tensor in same])


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """All gradients in one vector, with zeros for parameters that were not used."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])
