"""Backbones that cannot save activations are refused with a sentence."""

from __future__ import annotations

import pytest
from torch import nn

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.checkpointing import checkpoint_activations


class Refusing(nn.Module):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [(nn.Identity(), "needs a backbone with the method set_grad_checkpointing"), (Refusing(), "does not support it")],
)
def test_what_cannot_save_activations(backbone: nn.Module, reason: str) -> None:
    """Own backbones, and those of timm that refuse. Without the setting nobody asks them."""
    config = PeerConfig.model_validate({"name": "peer0", "backbone": "inception_v3", "checkpoint_activations": True})
    with pytest.raises(UserError, match=rf"peer0: checkpoint_activations.*{reason}.*micro_batch"):
        checkpoint_activations(backbone, config)
    checkpoint_activations(backbone, config.model_copy(update={"checkpoint_activations": False}))
