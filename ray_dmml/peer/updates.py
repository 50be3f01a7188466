"""How a peer's gradients become an update: accumulated, checked, unscaled, clipped, applied and averaged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ray_dmml.config.schema import PeerConfig
from ray_dmml.models.embedding_net import EmbeddingNet
from ray_dmml.peer.optim import MovingAverage, set_learning_rates

Accumulated = list[tuple[torch.nn.Parameter, Tensor | None]]
"""Parameters and their gradients of earlier batches."""


class Updates:
    """The updates of one peer.

    Args:
        parameters: all parameters of the peer, also those that do not learn.
        scaler: the loss scaler of amp float16, else disabled.
    """

    def __init__(
        self,
        config: PeerConfig,
        parameters: Iterable[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: MovingAverage | None,
    ) -> None:
        self._config, self._parameters = config, list(parameters)
        self._optimizer, self._scaler, self._ema = optimizer, scaler, ema

    def is_due(self, step: int) -> bool:
        """Whether the interval ends with this step."""
        return (step + 1) % self._config.update_interval == 0

    def learns_from(self, step: int) -> bool:
        """Whether the batch of a step gets a gradient."""
        if self._config.frozen:
            return False
        return self._config.update_mode == "accumulate" or self.is_due(step)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is this batch's part of an update."""
        num_batches = self._config.update_interval if self._config.update_mode == "accumulate" else 1
        return self._scaler.scale(loss / num_batches)

    # --- gradients of earlier batches, which one that is not finite must not spoil --------------

    def set_aside(self) -> Accumulated:
        """Removes the gradients of earlier batches; empty if there are none."""
        if all(parameter.grad is None for parameter in self._parameters):
            return []
        accumulated = [(parameter, parameter.grad) for parameter in self._parameters]
        self.zero_grad()
        return accumulated

    def add_back(self, accumulated: Accumulated, is_finite: Tensor) -> None:
        """Adds the gradients of this batch to those of earlier ones if ``is_finite``, a scalar on the device."""
        for parameter, old in accumulated:
            new = parameter.grad
            if new is None:
                parameter.grad = old
            else:
                parameter.grad = torch.where(is_finite, new if old is None else old + new, 0 if old is None else old)

    def leave_out(self, accumulated: Accumulated) -> None:
        """Removes the gradients of this batch, which :meth:`add_back` has not added."""
        kept = {id(parameter) for parameter, old in accumulated if old is not None}
        for parameter in self._parameters:
            if id(parameter) not in kept:
                parameter.grad = None

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    # --- the update ---------------------------------------------------------------------------

    def gradient_norm(self) -> Tensor | None:
        """A norm of the whole gradient, a scalar on the device, which is finite if the gradient is; None: there is no
        gradient."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not gradients:
            return None
        # Scaled gradients may be too large for their squares.
        kind = torch.inf if self._scaler.is_enabled() else 2.0
        return torch.nn.utils.get_total_norm(gradients, kind)

    def apply(self, net: EmbeddingNet, step: int) -> None:
        """The update, if there is a gradient. It must be finite."""
        if all(parameter.grad is None for parameter in self._parameters):
            return
        set_learning_rates(self._optimizer, self._config.schedule, step)
        self._scaler.unscale_(self._optimizer)
        if self._config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), self._config.optimizer.clip_norm)
        self._optimizer.step()  # that of the scaler would read once more whether the gradient is finite
        self._scaler.update()
        self.zero_grad()
        if self._ema is not None:
            self._ema.update(net)

    def scale_less(self) -> None:
        """Drops a gradient that is not finite because the loss was scaled too much."""
        self._scaler.unscale_(self._optimizer)  # notices it
        self._scaler.update()
        self.zero_grad()
