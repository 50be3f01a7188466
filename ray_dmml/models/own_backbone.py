"""A backbone of one's own: ``backbone: module:Class``."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ray_dmml.config.parts import call_part, describe, find_part, is_own, place_of, required
from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError


def is_own_backbone(name: str) -> bool:
    """Whether a backbone is an own one. Names of timm come first."""
    return not timm.is_model(name) and is_own(name)


def build_own_backbone(config: PeerConfig) -> nn.Module:
    """Calls the class or function with ``backbone_args``, and with ``input_size`` if it requires that.

    The module takes standardized float32 images (B, 3, H, W), and gives features (B, F). Its attribute
    ``pretrained_cfg`` may state timm's ``input_size``, ``mean``, ``std`` and ``crop_pct``; without it they are those of
    ImageNet.

    Raises:
        UserError: it cannot be found or built, or gives something else.
    """
    setting, name = f"backbone of {config.name}", config.backbone
    if config.pooling != "native":
        raise UserError(f"{setting}: {name} pools itself, so pooling must be native, not {config.pooling}")
    part = find_part(setting, name)
    sizes = {} if config.input_size is None else {"input_size": config.input_size}
    backbone: Any = call_part(setting, name, part, {**required(part, sizes), **config.backbone_args})
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{setting}: {name} must give a torch.nn.Module, and gives a {type(backbone).__name__}")
    if not hasattr(backbone, "pretrained_cfg"):
        backbone.pretrained_cfg = {}  # type: ignore[assignment]
    size = config.input_size or int(resolve_model_data_config(backbone)["input_size"][-1])
    is_training = backbone.training
    try:
        with torch.no_grad():
            features: Any = backbone.eval()(torch.zeros(2, 3, size, size))
    except Exception as error:
        raise UserError(f"{setting}: {name} fails on {size} x {size} px{place_of(error)}: {describe(error)}") from error
    backbone.train(is_training)
    if not (isinstance(features, Tensor) and features.ndim == 2 and len(features) == 2):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"{setting}: {name} must give features (B, F), and gives {got} for 2 images")
    if not all(isinstance(value, Tensor) for value in backbone.state_dict().values()):
        raise UserError(f"{setting}: {name} must have a state_dict of tensors only, without get_extra_state")
    return backbone
