"""One peer of the cohort: net, losses, optimiser, view, update interval, ema. Plain PyTorch.

A step has three calls, so that whoever drives peers can put the exchange between them:
``embed(batch)`` gives the embeddings to publish; ``measure()`` computes what needs no other peer
(while the others' embeddings travel); ``update(others)`` adds the mutual term and learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ray_dmml.config.schema import LossConfig, PeerConfig, ScheduleConfig
from ray_dmml.data.augmentations import View, evaluation_view, training_view
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.loader import Batch, in_chunks
from ray_dmml.errors import NonFiniteLossError, UserError
from ray_dmml.losses.metric import MetricLoss
from ray_dmml.losses.relational import relational_losses
from ray_dmml.models.embedding_net import EmbeddingNet, autocast, build_embedding_net, compiled
from ray_dmml.models.pretrained import load_net_weights
from ray_dmml.peer.data_parallel import Replicas
from ray_dmml.randomness import seeded

OPTIMIZER_SETTINGS = {"base_lr", "weight_decay", "momentum"}
"""Of a group of parameters, as the config says; `lr` follows from the step."""

LOSS_LR_FACTOR = 100
"""Proxies start at random beside a pretrained net: the factor of Kim et al. 2020 (arXiv 2003.13911)."""


class Peer:
    """One network that learns from labels and from the other peers' embeddings.

    Args:
        config: this peer.
        loss: what it minimises.
        run_seed: with the peer's own seed, the source of its random draws.
        num_classes: training classes (for losses with proxies).
        decode_size: side S of the decoded images it is given, in pixels.
        device: where it computes.
        on_nonfinite: ``fail`` or ``skip``, see :class:`~ray_dmml.config.schema.FailureConfig`.
        max_consecutive_nonfinite: with ``skip``, batches that may be left out one after the other.
        initial_weights: False leaves ``config.weights`` unread, for a state that is loaded next.

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
        decode_size: int,
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
        self._relational = loss.relational
        self._skips_bad, self._max_bad = on_nonfinite == "skip", max_consecutive_nonfinite
        self._num_bad_in_a_row = 0
        self._is_bad = False  # something of this step is not finite, and is not learned from
        self._run_seed = run_seed
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.net: EmbeddingNet = build_embedding_net(config, run_seed, initial_weights)
        self.net.to(device).to(memory_format=layout)
        crop = config.eval_crop if config.eval_crop is not None else self.net.eval_crop
        self.view = training_view(config.view, self.net.input_size, decode_size, self.name, device)
        self.eval_view = evaluation_view(self.net.input_size, crop, decode_size, device)
        with self._seeded("loss", "init"):
            self.metric = MetricLoss(loss.metric, num_classes, config.embedding_size).to(device)
        self.ema = (
            AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(config.ema.decay))
            if config.ema is not None
            else None
        )
        self._trained_net = (
            compiled(self.net, self.name, device)
            if config.compile
            else self.net.forward_unnormalized
        )
        self.optimizer = self._build_optimizer()
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.replicas: Replicas | None = None
        """Those that share its batches, where it has more than one device."""
        self._batch: Batch | None = None
        self._raw: Tensor | None = None  # (B, D) before normalisation, with its graph
        self._embedding: Tensor | None = None  # the same of unit length, where this step learns
        self._metric_term: Tensor | None = None

    # --- one step ---------------------------------------------------------------------------

    @contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Raises UserError where the device has not enough memory for what is done inside."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; CPUs have none of their own
            told = str(error).splitlines()[0]
            is_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in told
            if not is_memory:
                raise
            batch = "an evaluation"
            if self._batch is not None:
                batch = f"step {self._batch.step + 1} ({len(self._batch.labels)} images a batch)"
            raise UserError(
                f"{self.name}: {self.device} ran out of memory in {batch}: {told}. "
                f"{self.config.backbone} at {self.net.input_size} pixels, amp {self.config.amp}: "
                "lower data.classes_per_batch, input_size or evaluation.batch_size, set amp, or "
                "give the peer a larger part of a device (num_gpus)"
            ) from None

    def embed(self, batch: Batch) -> Tensor:
        """The peer's own view of the batch -> its embeddings to publish, (B, D) float32, detached: of
        unit length, or as its head gives them (``loss.relational.normalize``).

        Raises:
            NonFiniteLossError: an embedding is NaN or infinite. (With ``on_nonfinite: skip`` it is
                published as it is, and nobody learns from it.)
        """
        self._batch = batch
        self._metric_term = None
        self._is_bad = False
        with self._seeded(batch.step, "view"):
            images = self._augment(self.view, batch.images)
        if self._learns_from(batch.step):
            self.net.train()
            # BatchNorm would keep what is not finite for ever.
            before = [buffer.clone() for buffer in self.net.buffers()] if self._skips_bad else []
            with self._seeded(batch.step, "dropout"), self._autocast():
                if self.replicas is None:
                    self._raw = self._trained_net(images)
                else:
                    self._raw = self.replicas.embed(self._trained_net, self.net, images)
            self._embedding = F.normalize(self._raw)
            published = self._to_publish(self._raw.detach())
            if before and not torch.isfinite(published).all():
                for buffer, old in zip(self.net.buffers(), before, strict=True):
                    buffer.copy_(old)
        else:
            # Evaluation mode: a batch that is not learned from moves no BatchNorm statistics.
            self._raw = self._embedding = None
            published = self._to_publish(self._infer(self.net, images))
        if self.ema is not None and self.config.ema and self.config.ema.as_teacher:
            published = self._to_publish(self._infer(self._ema_net, images))
        self._check_finite("embedding", published, batch.step)
        return published

    def measure(self) -> None:
        """The metric loss of the step: all of it that needs no other peer."""
        if self._embedding is None or self._batch is None or self._is_bad:
            return
        with self._seeded(self._batch.step, "miner"):
            self._metric_term = self.metric(
                self._embedding, self._batch.labels.to(self.device, non_blocking=True)
            )

    def update(self, others: Sequence[Tensor]) -> dict[str, float]:
        """Adds relational distillation against the others, goes backward, steps at each k-th batch.

        Args:
            others: embeddings that the other peers published for this batch, (B, D_n) float32
                each, in peer order.

        Returns:
            the terms of the loss by name; empty where this step is not learned from;
            ``{"left_out": 1}`` where it would have been, were its numbers finite.

        Raises:
            NonFiniteLossError: a term or gradient is NaN or infinite, or with ``skip`` too many
                batches were left out in a row; nothing was learned from this step.
        """
        if self._embedding is None or self._batch is None:
            return {}
        terms = self._learn_from(others)
        self._raw = self._embedding = self._metric_term = None
        if not self._is_bad:
            self._num_bad_in_a_row = 0
            return terms
        self._num_bad_in_a_row += 1
        if self._num_bad_in_a_row > self._max_bad:
            raise NonFiniteLossError(
                f"{self.name}: the numbers of {self._num_bad_in_a_row} batches in a row were not "
                f"finite, the last at step {self._batch.step + 1} (failure.max_consecutive_nonfinite)"
            )
        return {"left_out": 1.0}

    def _learn_from(self, others: Sequence[Tensor]) -> dict[str, float]:
        """The rest of :meth:`update`: marks the step as bad where its numbers are."""
        assert self._batch is not None
        if self._is_bad:
            self._end_of_interval(self._batch.step)
            return {}
        if self._metric_term is None:
            self.measure()
        step, interval = self._batch.step, self._interval
        assert self._metric_term is not None
        assert self._raw is not None and self._embedding is not None
        terms = {"metric": self._metric_term}
        loss = self._metric_term
        ramp = (
            min(1.0, step / self._relational.warmup_steps) if self._relational.warmup_steps else 1.0
        )
        w_d, w_a = ramp * self._relational.distance_weight, ramp * self._relational.angle_weight
        if self._skips_bad:  # what a peer published that does not learn from it either
            others = [other for other in others if torch.isfinite(other).all()]
        if others and (w_d or w_a):
            mutual = relational_losses(
                self._raw if not self._relational.normalize else self._embedding,
                [other.to(self.device, non_blocking=True) for other in others],
                with_distance=w_d > 0,
                with_angle=w_a > 0,
            )
            terms |= {"distance": mutual.distance, "angle": mutual.angle}
            loss = loss + (w_d * mutual.distance + w_a * mutual.angle)
        for term, value in terms.items():
            self._check_finite(f"{term} loss", value.detach(), step)
        if not self._is_bad:
            self._scaler.scale(loss / interval).backward()
            if self.replicas is not None:
                self.replicas.backward(self.net)
        self._end_of_interval(step)
        return {"loss": float(loss.detach()), **{k: float(v.detach()) for k, v in terms.items()}}

    # --- evaluation -------------------------------------------------------------------------

    def embed_images(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        ema: bool = False,
        after_chunk: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """The evaluation view of every image -> (N, D) float32, in the images' order.

        Args:
            ema: use the averaged weights where the peer keeps them.
            after_chunk: is called whenever ``batch_size`` images are done.

        Raises:
            NonFiniteLossError: an embedding is NaN or infinite.
        """
        net = self._ema_net if ema and self.ema is not None else self.net
        found = []
        for chunk in in_chunks(images, batch_size):
            found.append(F.normalize(self._infer(net, self._augment(self.eval_view, chunk))).cpu())
            after_chunk()
        embeddings = torch.cat(found)
        self._require_finite("embedding of an image", embeddings, "in an evaluation")
        return embeddings.numpy()

    # --- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on: weights and buffers, averaged weights, parameters
        of the loss, optimiser, loss scaler, half-accumulated gradients. Random draws and learning
        rates are functions of the step and need no state."""
        state: dict[str, Any] = {
            "net": self.net.state_dict(),
            "metric": self.metric.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "num_bad_in_a_row": self._num_bad_in_a_row,
            "gradients": {
                name: parameter.grad
                for name, parameter in self._named_parameters()
                if parameter.grad is not None
            },
        }
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
            state["num_ema_updates"] = self.ema.n_averaged
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the peer exactly where :meth:`state_dict` found it."""
        self.net.load_state_dict(state["net"])
        self.metric.load_state_dict(state["metric"])
        # Its settings stay the config's, which population based training changes in mid-run.
        groups = self.optimizer.param_groups
        own = [{key: group[key] for key in OPTIMIZER_SETTINGS & group.keys()} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self._scaler.load_state_dict(state["scaler"])
        self._num_bad_in_a_row = state.get("num_bad_in_a_row", 0)  # older states have none
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.copy_(state["num_ema_updates"])
        for name, parameter in self._named_parameters():
            gradient = state["gradients"].get(name)
            parameter.grad = (
                None if gradient is None else torch.empty_like(parameter).copy_(gradient)
            )
        self._raw = self._embedding = self._metric_term = self._batch = None

    def load_weights(self, net: dict[str, Tensor]) -> None:
        """Starts from these weights of the net; everything else is as it was built.

        Raises:
            UserError: names or shapes differ.
        """
        load_net_weights(self.net, net, f"for {self.name}")
        if self.ema is not None:
            self.ema.module.load_state_dict(net)

    # --- inside -----------------------------------------------------------------------------

    @property
    def _interval(self) -> int:
        """Batches whose gradients make up one update."""
        return self.config.update_interval if self.config.update_mode == "accumulate" else 1

    def _learns_from(self, step: int) -> bool:
        if self.config.frozen:
            return False
        return (
            self.config.update_mode == "accumulate" or (step + 1) % self.config.update_interval == 0
        )

    def _end_of_interval(self, step: int) -> None:
        """The update, where one is due and any batch of the interval has given gradients."""
        is_due = (step + 1) % self.config.update_interval == 0
        if is_due and any(p.grad is not None for _, p in self._named_parameters()):
            self._optimizer_step(step)

    def _optimizer_step(self, step: int) -> None:
        """One optimiser step."""
        factor = learning_rate_factor(self.config.schedule, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if self.config.optimizer.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.optimizer.clip_norm)
        if not self._scaler.is_enabled():  # which itself leaves out updates that overflow
            gradients = [p.grad for _, p in self._named_parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._check_finite("gradient", norm, step)
            if not torch.isfinite(norm):
                self.optimizer.zero_grad(set_to_none=True)
                return
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.net)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config = self.config.optimizer
        head_lr = config.lr if config.head_lr is None else config.head_lr
        loss_lr = config.lr * LOSS_LR_FACTOR if config.loss_lr is None else config.loss_lr
        groups: list[dict[str, Any]] = [
            {"params": list(self.net.backbone.parameters()), "base_lr": config.lr},
            {"params": list(self.net.head.parameters()), "base_lr": head_lr},
        ]
        proxies = list(self.metric.parameters())
        if proxies:
            groups.append({"params": proxies, "base_lr": loss_lr})
        settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        if config.name == "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum, **settings)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name](
            groups, **settings
        )

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        own = [(f"net.{name}", p) for name, p in self.net.named_parameters()]
        return own + [(f"metric.{name}", p) for name, p in self.metric.named_parameters()]

    @property
    def _ema_net(self) -> EmbeddingNet:
        assert self.ema is not None
        return cast(EmbeddingNet, self.ema.module)

    def _to_publish(self, raw: Tensor) -> Tensor:
        """What the others take relations of."""
        return raw if not self._relational.normalize else F.normalize(raw)

    def _infer(self, net: EmbeddingNet, images: Tensor) -> Tensor:
        """Embeddings before normalisation, in evaluation mode."""
        net.eval()
        with torch.no_grad(), self._autocast():
            if self.replicas is None:
                return net.forward_unnormalized(images)
            return self.replicas.infer(net, images, ema=net is not self.net)

    def _augment(self, view: View, images: Tensor) -> Tensor:
        """A view of decoded images, on the peer's device."""
        if self.device.type == "cuda":
            images = images.pin_memory()
        return view(images).to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.amp, self.device)

    def _seeded(self, *key: int | str) -> Any:
        """Draws of this peer: they follow its seed and the key, not its name or position."""
        return seeded(self._run_seed, self.config.seed or 0, *key)

    def _check_finite(self, what: str, value: Tensor, step: int) -> None:
        """With ``skip`` the step is marked, else raises NonFiniteLossError."""
        if self._skips_bad:
            self._is_bad |= not bool(torch.isfinite(value).all())
        else:
            self._require_finite(what, value, f"at step {step + 1}")

    def _require_finite(self, what: str, value: Tensor, when: str) -> None:
        """Steps are told as metrics.jsonl counts them, from 1."""
        if not torch.isfinite(value).all():
            raise NonFiniteLossError(
                f"{self.name}: the {what} is not finite {when}; try a lower learning rate, "
                "optimizer.clip_norm, or a gentler weight of the mutual term"
            )


def learning_rate_factor(schedule: ScheduleConfig, step: int) -> float:
    """What the learning rates are multiplied by at a step (0 for the first): a pure function, so
    there is no schedule state to lose."""
    factor = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.name == "step":
        factor *= schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    elif schedule.name == "cosine":
        end = schedule.steps or 1  # the config makes sure that it is given
        cycle = (step * schedule.cycles / end) % 1 if step < end else 1.0
        factor *= 0.5 * (1 + math.cos(math.pi * cycle))
    return factor
