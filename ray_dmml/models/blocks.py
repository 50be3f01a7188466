"""The order of a backbone's parameters from the stem to the head, as timm groups them, and blocks that do not learn."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from torch import nn

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError

_HEAD = "<head>"  # the name of no parameter: timm puts what belongs to no block into the last layer, the head's


def layer_numbers(backbone: nn.Module, setting: str, *, coarse: bool) -> tuple[Mapping[str, int], int]:
    """The layer of every parameter by name, 0 for the stem, and that of the head.

    Args:
        setting: what needs them, for the error.
        coarse: layers are the blocks of a transformer and the stages of a convolutional net. Else they are the
            blocks of a stage, too.

    Raises:
        UserError: the backbone has no ``group_matcher``, which every model of timm has.
    """
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"{setting} needs a backbone whose method group_matcher tells its blocks apart, as that of timm's models; "
            f"{type(backbone).__name__} has none"
        )
    named: list[tuple[str, Any]] = [*backbone.named_parameters(), (_HEAD, None)]
    with_head = SimpleNamespace(named_parameters=lambda: iter(named))
    layers: dict[str, int] = group_parameters(with_head, matcher(coarse=coarse), reverse=True)
    return layers, layers.pop(_HEAD)


def freeze_blocks(backbone: nn.Module, config: PeerConfig) -> None:
    """Lets the parameters that ``config.freeze_blocks`` names require no gradient.

    Raises:
        UserError: the backbone has fewer blocks, or is none of timm's.
    """
    if config.freeze_blocks is None:
        return
    if config.freeze_blocks == "all":
        backbone.requires_grad_(False)
        return
    layers, head = layer_numbers(backbone, f"{config.name}: freeze_blocks {config.freeze_blocks}", coarse=True)
    num_blocks = head - 1
    if config.freeze_blocks > num_blocks:
        raise UserError(
            f"{config.name}: freeze_blocks is {config.freeze_blocks}, and {config.backbone} has {num_blocks} blocks "
            "(all freezes the whole backbone)"
        )
    for name, parameter in backbone.named_parameters():
        if layers[name] <= config.freeze_blocks:
            parameter.requires_grad_(False)


def frozen_modules(backbone: nn.Module) -> tuple[nn.Module, ...]:
    """The largest modules that have parameters and train none of them. Their BatchNorm and dropout do not train
    either."""
    parameters = list(backbone.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return (backbone,)
    return tuple(module for child in backbone.children() for module in frozen_modules(child))
