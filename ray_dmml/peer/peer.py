"""One peer of the cohort: net, losses, optimizer, view, update interval. Plain PyTorch, no Ray.

A training step consists of three calls, so that the caller can exchange embeddings between them::

    out = peer.forward(batch)                 # out.published: the embeddings for the other peers
    loss = peer.metric_loss(out)              # needs no other peer
    terms = peer.step(out, loss, teachers)    # teachers: the embeddings that the others published
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.config.schema import LossConfig, PeerConfig
from ray_dmml.data.loader import Batch
from ray_dmml.errors import NonFiniteLossError, UserError
from ray_dmml.losses.metric import MetricLoss
from ray_dmml.losses.mutual import MutualLoss
from ray_dmml.models.embedding_net import EmbeddingNet, autocast, build_embedding_net, compiled
from ray_dmml.models.lora import adapter_state, add_adapters, load_adapter_state
from ray_dmml.models.pretrained import load_net_weights
from ray_dmml.peer.data_parallel import Replicas
from ray_dmml.peer.optim import build_ema, build_optimizer, set_learning_rates
from ray_dmml.randomness import seeded


@dataclass(frozen=True, eq=False)
class PeerOutput:
    """A peer's embeddings of one batch: what :meth:`Peer.forward` hands on to the rest of the step."""

    batch: Batch

    published: Tensor
    """(B, D) float32, detached: the embeddings for the other peers."""

    raw: Tensor | None
    """(B, D) float32 with a graph, before normalization; None if the peer does not learn from this batch."""

    embedding: Tensor | None
    """``raw`` at unit length."""

    is_finite: bool
    """False if ``published`` holds NaN or infinity; the peer then does not learn from this batch."""


class Peer:
    """One network that learns from labels and from the embeddings of the other peers.

    Args:
        config: settings of this peer.
        loss: settings of its losses.
        run_seed: seed of the run. Together with the peer's own seed it determines all random draws.
        num_classes: number of training classes, for losses with proxies.
        device: device of the net.
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
        self.net.to(device).to(memory_format=layout)
        with self._seeded("loss", "init"):
            self.metric = MetricLoss(loss.metric, num_classes, config.embedding_size).to(device)
            self.mutual = MutualLoss(loss, config.embedding_size, ignore_nonfinite=self._skips_nonfinite).to(device)
        self._losses = torch.nn.ModuleDict({"metric": self.metric, "mutual": self.mutual})
        self.ema = build_ema(config.ema, self.net)
        self._training_forward = (
            compiled(self.net, self.name, device) if config.compile else self.net.forward_unnormalized
        )
        self.optimizer = build_optimizer(config, self.net, self._losses)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.kept: Tensor | None = None
        """(N, D) float32 to publish for each training image, if a frozen peer has computed them before training."""
        self.replicas: Replicas | None = None
        """Further processes that share the peer's batches, if it has more than one device."""

    # --- one step ---------------------------------------------------------------------------

    def forward(self, batch: Batch) -> PeerOutput:
        """Embeds a batch, whose images are the peer's own view of it: (B, 3, H, H) uint8 on the CPU.

        Raises:
            NonFiniteLossError: an embedding is NaN or infinite. With ``on_nonfinite: skip`` the output is
                marked instead, and no peer learns from it.
        """
        if self.kept is not None:
            published = self.kept[batch.indices.to(self.device)]
            return PeerOutput(batch, published, None, None, self._check_finite("embedding", published, batch.step))
        images = self._on_device(batch.images)
        raw = embedding = None
        if self._learns_from(batch.step):
            raw = self._forward_with_graph(images, batch.step)
            embedding = F.normalize(raw)
            published = self._to_publish(raw.detach())
        else:
            # Evaluation mode: a batch that is not learned from moves no BatchNorm statistics.
            published = self._to_publish(self._infer(self.net, images))
        if self.ema is not None and self.config.ema and self.config.ema.as_teacher:
            published = self._to_publish(self._infer(self._ema_net, images))
        is_finite = self._check_finite("embedding", published, batch.step)
        return PeerOutput(batch, published, raw, embedding, is_finite)

    def metric_loss(self, out: PeerOutput) -> Tensor | None:
        """The peer's own metric loss: a scalar; None if the peer does not learn from this batch."""
        if out.embedding is None or not out.is_finite:
            return None
        with self._seeded(out.batch.step, "miner"):
            return self.metric(out.embedding, out.batch.labels.to(self.device, non_blocking=True))

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
            NonFiniteLossError: a term or gradient is NaN or infinite, or with ``skip`` too many
                batches in a row were left out. The net is unchanged.
        """
        if out.raw is None or out.embedding is None:
            return {}
        step = out.batch.step
        terms: dict[str, Tensor] = {}
        is_finite = metric_loss is not None
        if metric_loss is not None:
            with self._seeded(step, "mutual"):
                mutual, mutual_terms = self.mutual(
                    out.raw, out.embedding, teachers, step, published=out.published, place=place
                )
            loss = metric_loss if mutual is None else metric_loss + mutual
            terms = {"loss": loss, "metric": metric_loss, **mutual_terms}
            for name in ("metric", *mutual_terms):
                is_finite &= self._check_finite(f"{name} loss", terms[name].detach(), step)
            if is_finite:
                self._backward(loss)
        is_finite &= self._update_if_due(step)
        if is_finite:
            self._num_consecutive_nonfinite = 0
            return {name: float(value.detach()) for name, value in terms.items()}
        self._num_consecutive_nonfinite += 1
        if self._num_consecutive_nonfinite > self._max_consecutive_nonfinite:
            raise NonFiniteLossError(
                f"{self.name}: {self._num_consecutive_nonfinite} batches in a row had values that are not "
                f"finite, the last at step {step + 1} (failure.max_consecutive_nonfinite)"
            )
        return {"skipped_nonfinite": 1.0}

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
        net = self._ema_net if ema and self.ema is not None else self.net
        embedded = []
        for chunk in chunks:
            raw = self._infer(net, self._on_device(chunk), features=features)
            embedded.append(F.normalize(raw).cpu())
            after_chunk()
        embeddings = torch.cat(embedded)
        if not torch.isfinite(embeddings).all():
            raise self._not_finite("embedding of an image", "in an evaluation")
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
            state["ema"] = self.ema.module.state_dict()
            state["ema_adapters"] = adapter_state(self._ema_net)
            state["num_ema_updates"] = self.ema.n_averaged
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned. With ``net`` and ``ema`` alone, the peer can only be evaluated."""
        load_net_weights(self.net, state["net"], f"of {self.name}")
        if "optimizer" not in state:
            if self.ema is not None and "ema" in state:
                self.ema.module.load_state_dict(state["ema"])
            return
        load_adapter_state(self.net, state.get("adapters", {}))
        self.metric.load_state_dict(state["metric"])
        self.mutual.load_state_dict(state["mutual"])
        if not self.config.frozen:
            self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._num_consecutive_nonfinite = state["num_consecutive_nonfinite"]
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            load_adapter_state(self._ema_net, state["ema_adapters"])
            self.ema.n_averaged.copy_(state["num_ema_updates"])
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
            self.ema.module.load_state_dict(state["net"])
            load_adapter_state(self._ema_net, state.get("adapters", {}))

    # --- inside -----------------------------------------------------------------------------

    def _learns_from(self, step: int) -> bool:
        if self.config.frozen:
            return False
        return self.config.update_mode == "accumulate" or (step + 1) % self.config.update_interval == 0

    def _forward_with_graph(self, images: Tensor, step: int) -> Tensor:
        self.net.train()
        # BatchNorm statistics would keep a value that is not finite forever.
        before = [buffer.clone() for buffer in self.net.buffers()] if self._skips_nonfinite else []
        with self._seeded(step, "dropout"), self._autocast():
            if self.replicas is None:
                raw = self._training_forward(images)
            else:
                raw = self.replicas.embed(self._training_forward, self.net, images)
        if before and not torch.isfinite(raw).all():
            for buffer, old in zip(self.net.buffers(), before, strict=True):
                buffer.copy_(old)
        return raw

    def _backward(self, loss: Tensor) -> None:
        accumulates = self.config.update_mode == "accumulate"
        num_batches = self.config.update_interval if accumulates else 1
        self._scaler.scale(loss / num_batches).backward()
        if self.replicas is not None:
            self.replicas.backward(self.net)

    def _update_if_due(self, step: int) -> bool:
        """The update at the end of an interval; False if the gradient is not finite."""
        is_due = (step + 1) % self.config.update_interval == 0
        if is_due and any(p.grad is not None for _, p in self._named_parameters()):
            return self._optimizer_step(step)
        return True

    def _optimizer_step(self, step: int) -> bool:
        set_learning_rates(self.optimizer, self.config.schedule, step)
        if self.config.optimizer.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.optimizer.clip_norm)
        if not self._scaler.is_enabled():  # the scaler itself leaves out updates that overflow
            gradients = [p.grad for _, p in self._named_parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not self._check_finite("gradient", norm, step):
                self.optimizer.zero_grad(set_to_none=True)
                return False
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.net)
        return True

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        own = [(f"net.{name}", p) for name, p in self.net.named_parameters()]
        return own + list(self._losses.named_parameters())

    @property
    def _ema_net(self) -> EmbeddingNet:
        assert self.ema is not None
        return cast(EmbeddingNet, self.ema.module)

    def _to_publish(self, raw: Tensor) -> Tensor:
        return F.normalize(raw) if self._publishes_unit_length else raw

    def _infer(self, net: EmbeddingNet, images: Tensor, *, features: bool = False) -> Tensor:
        """(B, D) embeddings before normalization, in evaluation mode, without a graph; or the (B, F) features."""
        net.eval()
        with torch.no_grad(), self._autocast():
            if self.replicas is None:
                return net.backbone_features(images) if features else net.forward_unnormalized(images)
            return self.replicas.infer(net, images, ema=net is not self.net, features=features)

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.amp, self.device)

    def _seeded(self, *key: int | str) -> Any:
        """Random draws of this peer follow its seed and the key, not its name or position."""
        return seeded(self._run_seed, self.config.seed or 0, *key)

    def _check_finite(self, what: str, value: Tensor, step: int) -> bool:
        """Whether all values are finite. Raises NonFiniteLossError unless such batches are skipped."""
        is_finite = bool(torch.isfinite(value).all())
        if not is_finite and not self._skips_nonfinite:
            # Messages count steps from 1, as metrics.jsonl does.
            raise self._not_finite(what, f"at step {step + 1}")
        return is_finite

    def _not_finite(self, what: str, when: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{self.name}: the {what} is not finite {when}; try a lower learning rate, "
            "optimizer.clip_norm, or a smaller weight of the mutual term"
        )
