"""Activation checkpointing by the backbone's own method: activations are computed again instead of kept."""

from __future__ import annotations

from typing import Any

from torch import nn

from ray_dmml.config.parts import describe
from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError


def checkpoint_activations(backbone: nn.Module, config: PeerConfig) -> None:
    """Calls ``backbone.set_grad_checkpointing()`` if ``config.checkpoint_activations`` asks for it.

    Raises:
        UserError: the backbone has no such method, or refuses.
    """
    if not config.checkpoint_activations:
        return
    setting = f"{config.name}: checkpoint_activations"
    method: Any = getattr(backbone, "set_grad_checkpointing", None)
    if method is None:
        raise UserError(
            f"{setting} needs a backbone with the method set_grad_checkpointing, as most of timm's models have it; "
            f"{config.backbone} has none (data.micro_batch saves memory with any backbone)"
        )
    try:
        method()
    except Exception as error:  # timm's models assert that they are not asked for it
        raise UserError(
            f"{setting}: {config.backbone} does not support it ({describe(error)}); data.micro_batch saves memory with "
            "any backbone"
        ) from None
