"""How a peer's parameters change: parameter groups, the learning-rate schedule, the moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ray_dmml.config.schema import EmaConfig, PeerConfig, ScheduleConfig
from ray_dmml.models.blocks import layer_numbers
from ray_dmml.models.embedding_net import EmbeddingNet

LOSS_LR_FACTOR = 100
"""Default learning rate of proxies, relative to the backbone's. Proxies start from random values beside a
pretrained net; the factor is that of Proxy-Anchor (Kim et al. 2020, https://arxiv.org/abs/2003.13911)."""


def build_optimizer(peer: PeerConfig, net: EmbeddingNet, losses: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the parameters that learn: those of backbone, head and losses.

    Each group has a ``base_lr``; :func:`set_learning_rates` derives ``lr`` from it at every update.

    Raises:
        UserError: the backbone has no ``group_matcher`` for ``layer_decay``.
    """
    config = peer.optimizer
    head_lr = config.lr if config.head_lr is None else config.head_lr
    loss_lr = config.lr * LOSS_LR_FACTOR if config.loss_lr is None else config.loss_lr
    groups = [
        *_backbone_groups(peer, net.backbone),
        *({**group, "base_lr": head_lr} for group in param_groups_weight_decay(net.head, config.weight_decay)),
    ]
    if proxies := list(losses.parameters()):
        groups.append({"params": proxies, "base_lr": loss_lr})
    args: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **args)
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizers[config.name](groups, **args)


def _backbone_groups(peer: PeerConfig, backbone: nn.Module) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; with ``layer_decay``, those of each layer apart."""
    config = peer.optimizer
    exempt: Collection[str] = getattr(backbone, "no_weight_decay", tuple)()
    groups = param_groups_weight_decay(backbone, config.weight_decay, no_weight_decay_list=exempt)
    if config.layer_decay is None:
        return [{**group, "base_lr": config.lr} for group in groups]
    layers, head = layer_numbers(backbone, f"{peer.name}: optimizer.layer_decay", coarse=False)
    layer_of = {id(parameter): layers[name] for name, parameter in backbone.named_parameters()}
    rates = [config.lr * config.layer_decay ** (head - layer) for layer in range(head + 1)]
    return [
        {**group, "params": parameters, "base_lr": rate}
        for group in groups
        for layer, rate in enumerate(rates)
        if (parameters := [p for p in group["params"] if layer_of[id(p)] == layer])
    ]


def set_learning_rates(optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, step: int) -> None:
    """Sets every group's learning rate for a step (0 for the first)."""
    factor = learning_rate_factor(schedule, step)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def learning_rate_factor(schedule: ScheduleConfig, step: int) -> float:
    """The factor on all learning rates at a step (0 for the first).

    It is a pure function of the step, so that a schedule has no state that a checkpoint could lose.
    """
    factor = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.name == "step":
        factor *= schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    elif schedule.name == "cosine":
        end = schedule.steps or 1  # the config requires it for this schedule
        cycle = (step * schedule.cycles / end) % 1 if step < end else 1.0
        factor *= 0.5 * (1 + math.cos(math.pi * cycle))
    return factor


class MovingAverage:
    """The exponential moving average of a net's weights; the buffers are those of the net.

    It starts from the weights after the first update. ``torch.optim.swa_utils.AveragedModel`` gives the same bits, and
    copies its counter to the GPU at every update, which waits until the GPU has finished the step.
    """

    def __init__(self, config: EmaConfig, net: EmbeddingNet) -> None:
        self.net = copy.deepcopy(net)
        self.num_updates = 0
        self._average = get_ema_multi_avg_fn(config.decay)

    @torch.no_grad()
    def update(self, net: EmbeddingNet) -> None:
        """Includes the weights of the net in the average."""
        own: list[Tensor] = list(self.net.parameters())
        given = [parameter.detach() for parameter in net.parameters()]
        if self.num_updates:
            self._average(own, given, self.num_updates)
        else:
            torch._foreach_copy_(own, given)
        for buffer, new in zip(self.net.buffers(), net.buffers(), strict=True):
            buffer.copy_(new)
        self.num_updates += 1
