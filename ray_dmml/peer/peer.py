"""One peer of the cohort: net, losses, optimizer, view, update interval. Plain PyTorch, no Ray.

A training step consists of three calls, so that the caller can exchange embeddings between them::

    out = peer.forward(batch)                 # out.published: the embeddings for the other peers
    loss = peer.metric_loss(out)              # needs no other peer
    terms = peer.step(out, loss, teachers)    # teachers: the embeddings that the others published
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.config.schema import LossConfig, PeerConfig
from ray_dmml.data.loader import Batch
from ray_dmml.errors import NonFiniteLossError, NonFiniteTeacherError, UserError
from ray_dmml.losses.metric import MetricLoss
from ray_dmml.losses.mutual import MutualLoss
from ray_dmml.models.checkpointing import checkpoint_activations
from ray_dmml.models.embedding_net import EmbeddingNet, autocast, build_embedding_net
from ray_dmml.models.lora import adapter_state, add_adapters, load_adapter_state
from ray_dmml.models.pretrained import load_net_weights
from ray_dmml.peer.data_parallel import Replicas
from ray_dmml.peer.nonfinite import Undo, all_finite, largest, or_stand_in, read
from ray_dmml.peer.optim import MovingAverage, build_optimizer
from ray_dmml.peer.output import LearnedOutput, PeerOutput
from ray_dmml.peer.training_pass import TrainingPass
from ray_dmml.peer.updates import Updates
from ray_dmml.randomness import seeded


class Peer:
    """One network that learns from labels and from the embeddings of the other peers.

    Args:
        config: settings of this peer.
        loss: settings of its losses.
        run_seed: seed of the run. Together with the peer's own seed it determines all random draws.
        num_classes: number of training classes, for losses with proxies.
        device: device of the net.
        micro_batch: number of images whose activations are in memory at a time; None: all images of a batch.
        on_nonfinite: ``fail`` or ``skip``, see :class:`~ray_dmml.config.schema.FailureConfig`.
        max_consecutive_nonfinite: with ``skip``, the number of batches in a row that may be left out.
        initial_weights: False leaves ``config.weights`` unread, because a state is loaded next.

    Raises:
        UserError: the backbone, its weights, the view or the loss cannot be built as configured.
    """

    def __init__(
        self,
        config: PeerConfig,
        loss: LossConfig,
        *,
        run_seed: int,
        num_classes: int,
        device: torch.device,
        micro_batch: int | None = None,
        on_nonfinite: str = "fail",
        max_consecutive_nonfinite: int = 10,
        initial_weights: bool = True,
    ) -> None:
        if config.amp == "float16" and device.type == "cpu":
            raise UserError(f"{config.name}: amp float16 needs a GPU; use bfloat16 or off on a CPU")
        self.config = config
        self.name = str(config.name)
        self.device = device
        self._publishes_unit_length = loss.relational.normalize
        self._skips_nonfinite = on_nonfinite == "skip"
        self._max_consecutive_nonfinite = max_consecutive_nonfinite
        self._num_consecutive_nonfinite = 0
        self._run_seed = run_seed
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.net: EmbeddingNet = build_embedding_net(config, run_seed, initial_weights)
        add_adapters(self.net, config, run_seed)
        checkpoint_activations(self.net.backbone, config)
        self.net.to(device).to(memory_format=layout)
        with self._seeded("loss", "init"):
            self.metric = MetricLoss(loss.metric, num_classes, config.embedding_size).to(device)
            self.mutual = MutualLoss(loss, config.embedding_size).to(device)
        self._losses = torch.nn.ModuleDict({"metric": self.metric, "mutual": self.mutual})
        self.ema = None if config.ema is None else MovingAverage(config.ema, self.net)
        self.optimizer = build_optimizer(config, self.net, self._losses)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        parameters = [parameter for _, parameter in self._named_parameters()]
        self._updates = Updates(config, parameters, self.optimizer, self._scaler, self.ema)
        self._pass = TrainingPass(config, self.net, micro_batch, self.name)
        # Images that are embedded at a time where no graph is needed.
        self._chunk_size = None if micro_batch is None else micro_batch * config.num_replicas
        self.kept: Tensor | None = None
        """(N, D) float32 to publish for each training image, if a frozen peer has computed them before training."""
        self.replicas: Replicas | None = None
        """Further processes that share the peer's batches, if it has more than one device."""

    # --- one step ---------------------------------------------------------------------------

    def forward(self, batch: Batch) -> PeerOutput:
        """Embeds a batch, whose images are the peer's own view of it: (B, 3, H, H) uint8 on the CPU.

        It does not wait for a GPU: whether all is finite is read in :meth:`step`.
        """
        if self.kept is not None:
            published = self.kept[batch.indices.to(self.device, non_blocking=True)]
            return PeerOutput(batch, published, largest(published), None)
        images = self._on_device(batch.images)
        learned = self._embed_to_learn(images, batch.step) if self._updates.learns_from(batch.step) else None
        if self.ema is not None and self.config.ema and self.config.ema.as_teacher:
            raw = self._infer_batch(self.ema.net, images)
        elif learned is not None:
            raw = learned.leaf.detach()
        else:
            # Evaluation mode: a batch that is not learned from moves no BatchNorm statistics.
            raw = self._infer_batch(self.net, images)
        return PeerOutput(batch, self._to_publish(raw), largest(raw), learned)

    def metric_loss(self, out: PeerOutput) -> Tensor | None:
        """The peer's own metric loss: a scalar; None if the peer does not learn from this batch."""
        if out.learned is None:
            return None
        with self._seeded(out.batch.step, "miner"):
            return self.metric(out.learned.embedding, out.batch.labels)

    def step(
        self, out: PeerOutput, metric_loss: Tensor | None, teachers: Sequence[Tensor], place: int = 0
    ) -> dict[str, float]:
        """Adds the mutual term, runs the backward pass and updates the net if an update is due.

        Args:
            out: what :meth:`forward` returned.
            metric_loss: what :meth:`metric_loss` returned.
            teachers: embeddings that the other peers published for this batch, (B, D_n) float32
                each, in peer order.
            place: how many of them come before this peer in peer order.

        Returns:
            The terms of the loss by name; empty if the peer does not learn from this batch;
            ``{"skipped_nonfinite": 1}`` if the batch was left out because a value is not finite.

        Raises:
            NonFiniteLossError: an embedding, term or gradient is NaN or infinite, or with ``skip`` too
                many batches in a row were left out. The net is unchanged.
        """
        step, learned, updates = out.batch.step, out.learned, self._updates
        if learned is None or metric_loss is None:
            if not self._skips_nonfinite and not math.isfinite(float(out.largest)):
                raise self._not_finite("embedding", step)
            return {}
        others = [teacher.to(self.device, non_blocking=True) for teacher in teachers]
        received = {f"teacher {n}": largest(other) for n, other in enumerate(others)}
        if self._skips_nonfinite:
            others = [or_stand_in(*pair) for pair in zip(others, received.values(), strict=True)]
        with self._seeded(step, "mutual"):
            own = or_stand_in(out.published, out.largest)
            mutual, terms = self.mutual(learned.raw, learned.embedding, others, step, published=own, place=place)
        loss = metric_loss if mutual is None else metric_loss + mutual
        terms = {"metric": metric_loss, **terms}
        checked = {"embedding": torch.maximum(learned.largest, out.largest)}
        checked |= {f"{name} loss": term for name, term in terms.items()}

        earlier = updates.set_aside() if self._skips_nonfinite else []
        updates.scaled(loss).backward()
        if learned.leaf.grad is not None:  # else the losses do not depend on the embeddings
            learned.backward(learned.leaf.grad)
        if earlier:
            updates.add_back(earlier, all_finite([*checked.values(), *received.values()]))
        if updates.is_due(step) and (norm := updates.gradient_norm()) is not None:
            checked["gradient"] = norm

        # The only time that a step waits for the GPU. By now it has computed all but the update.
        numbers = read({"loss": loss, **checked, **received})
        wrong = [name for name in checked if not math.isfinite(numbers[name])]
        is_taught = [math.isfinite(numbers[name]) for name in received]
        if self._skips_nonfinite and not all(is_taught) and "embedding" not in wrong:
            learned.undo()
            updates.leave_out(earlier)
            again = self.forward(out.batch)  # now without the teachers that are not finite
            left = list(compress(teachers, is_taught))
            return self.step(again, self.metric_loss(again), left, sum(is_taught[:place]))
        if wrong == ["gradient"] and self._scaler.is_enabled():
            updates.scale_less()
            wrong = []
        elif wrong and not self._skips_nonfinite:
            error = self._not_finite(wrong[0], step)
            raise error if all(is_taught) else NonFiniteTeacherError(str(error))
        elif wrong:
            learned.undo()
            updates.leave_out(earlier)
            if "gradient" in wrong:
                updates.zero_grad()
        if updates.is_due(step):
            updates.apply(self.net, step)
        if wrong:
            return self._left_out(step)
        self._num_consecutive_nonfinite = 0
        return {"loss": numbers["loss"], **{name: numbers[f"{name} loss"] for name in terms}}

    # --- evaluation -------------------------------------------------------------------------

    def embed_to_publish(self, images: Tensor) -> Tensor:
        """What the peer publishes of images as its net takes them: (B, 3, H, H) uint8 -> (B, D) float32."""
        return self._to_publish(self._infer(self.net, self._on_device(images)))

    def embed_images(
        self,
        chunks: Iterable[Tensor],
        *,
        ema: bool = False,
        features: bool = False,
        after_chunk: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Embeds images: (N, D) float32 at unit length, in their order.

        Args:
            chunks: the evaluation view of the images, uint8 (n, 3, H, H) each, N in all.
            ema: use the moving average of the weights if the peer keeps one.
            features: the pooled features of the backbone, (N, F), instead of what the head makes of them.
            after_chunk: called after every chunk.

        Raises:
            NonFiniteLossError: an embedding is NaN or infinite.
        """
        net = self.ema.net if ema and self.ema is not None else self.net
        embedded = []
        for chunk in chunks:
            raw = self._infer(net, self._on_device(chunk), features=features)
            embedded.append(F.normalize(raw).cpu())
            after_chunk()
        embeddings = torch.cat(embedded)
        if not torch.isfinite(embeddings).all():
            raise self._not_finite("embedding of an image")
        return embeddings.numpy()

    # --- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: weights, buffers, moving average, parameters of the
        loss, optimizer, loss scaler and half-accumulated gradients. Random draws and learning rates are
        functions of the step and need no state."""
        state: dict[str, Any] = {
            "net": self.net.state_dict(),
            "adapters": adapter_state(self.net),
            "metric": self.metric.state_dict(),
            "mutual": self.mutual.state_dict(),
            "optimizer": {} if self.config.frozen else self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "num_consecutive_nonfinite": self._num_consecutive_nonfinite,
            "gradients": {
                name: parameter.grad for name, parameter in self._named_parameters() if parameter.grad is not None
            },
        }
        if self.ema is not None:
            state["ema"] = self.ema.net.state_dict()
            state["ema_adapters"] = adapter_state(self.ema.net)
            state["num_ema_updates"] = self.ema.num_updates
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned. With ``net`` and ``ema`` alone, the peer can only be evaluated."""
        load_net_weights(self.net, state["net"], f"of {self.name}")
        if "optimizer" not in state:
            if self.ema is not None and "ema" in state:
                self.ema.net.load_state_dict(state["ema"])
            return
        load_adapter_state(self.net, state.get("adapters", {}))
        self.metric.load_state_dict(state["metric"])
        self.mutual.load_state_dict(state["mutual"])
        if not self.config.frozen:
            self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._num_consecutive_nonfinite = state["num_consecutive_nonfinite"]
        if self.ema is not None:
            self.ema.net.load_state_dict(state["ema"])
            load_adapter_state(self.ema.net, state["ema_adapters"])
            self.ema.num_updates = state["num_ema_updates"]
        for name, parameter in self._named_parameters():
            gradient = state["gradients"].get(name)
            # A gradient has the memory layout of its parameter.
            parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Loads the weights of the net from what :meth:`state_dict` returned; optimizer and counters stay as they were
        built. Adapters of another shape than the net's are loaded as part of the weights.

        Raises:
            UserError: names or shapes differ.
        """
        load_net_weights(self.net, state["net"], f"for {self.name}")
        load_adapter_state(self.net, state.get("adapters", {}))
        if self.ema is not None:
            self.ema.net.load_state_dict(state["net"])
            load_adapter_state(self.ema.net, state.get("adapters", {}))

    # --- inside -----------------------------------------------------------------------------

    def _embed_to_learn(self, images: Tensor, step: int) -> LearnedOutput:
        self.net.train()
        # BatchNorm and the memory of a loss would keep a value that is not finite.
        undo = Undo(self.net, self._losses) if self._skips_nonfinite else Undo()
        with self._seeded(step, "dropout"):
            if self.replicas is None:
                leaf, backward = self._pass.embed(images)
            else:
                leaf, backward = self.replicas.embed(self._pass, self.net, images)
        size = largest(leaf)
        raw = or_stand_in(leaf.requires_grad_(), size)
        return LearnedOutput(leaf, size, raw, F.normalize(raw), backward, undo)

    def _left_out(self, step: int) -> dict[str, float]:
        """Counts a batch that is left out because a value is not finite."""
        self._num_consecutive_nonfinite += 1
        if self._num_consecutive_nonfinite > self._max_consecutive_nonfinite:
            raise NonFiniteLossError(
                f"{self.name}: {self._num_consecutive_nonfinite} batches in a row had values that are not "
                f"finite, the last at step {step + 1} (failure.max_consecutive_nonfinite)"
            )
        return {"skipped_nonfinite": 1.0}

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        own = [(f"net.{name}", p) for name, p in self.net.named_parameters()]
        return own + list(self._losses.named_parameters())

    def _to_publish(self, raw: Tensor) -> Tensor:
        return F.normalize(raw) if self._publishes_unit_length else raw

    def _infer(self, net: EmbeddingNet, images: Tensor, *, features: bool = False) -> Tensor:
        """(B, D) embeddings before normalization, in evaluation mode, without a graph; or the (B, F) features."""
        net.eval()
        with torch.no_grad(), self._autocast():
            if self.replicas is None:
                return net.backbone_features(images) if features else net.forward_unnormalized(images)
            return self.replicas.infer(net, images, ema=net is not self.net, features=features)

    def _infer_batch(self, net: EmbeddingNet, images: Tensor) -> Tensor:
        """The same for a training batch, of which no more than a micro batch is computed at a time."""
        chunks = images.split(self._chunk_size or len(images))
        return torch.cat([self._infer(net, chunk) for chunk in chunks])

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.amp, self.device)

    def _seeded(self, *key: int | str) -> Any:
        """Random draws of this peer follow its seed and the key, not its name or position."""
        return seeded(self._run_seed, self.config.seed or 0, *key)

    def _not_finite(self, what: str, step: int | None = None) -> NonFiniteLossError:
        # Messages count steps from 1, as metrics.jsonl does.
        when = "in an evaluation" if step is None else f"at step {step + 1}"
        return NonFiniteLossError(
            f"{self.name}: the {what} is not finite {when}; try a lower learning rate, "
            "optimizer.clip_norm, or a smaller weight of the mutual term"
        )
