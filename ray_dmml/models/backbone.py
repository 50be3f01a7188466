"""timm's backbones by name: with a tag of their weights, or from the Hugging Face hub."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ray_dmml.config.parts import describe
from ray_dmml.errors import UserError

HUB = "hf-hub:"
"""Prefix of a backbone that is a repository of the Hugging Face hub with a model of timm."""


def create_backbone(name: str, input_size: int | None) -> nn.Module:
    """A timm model without classifier and with the pooling that it was trained with; its weights are random.

    Args:
        name: a model of timm, with or without a tag (``vit_small_patch14_dinov2.lvd142m``), or ``hf-hub:OWNER/NAME``.
        input_size: side of the images in pixels; None: the model's own.

    Raises:
        UserError: there is no such model, the hub does not answer, or the model does not take the size.
    """
    args = timm_args(name, input_size)
    try:
        backbone: nn.Module = timm.create_model(name, num_classes=0, **args)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        size = f" with input_size {input_size}" if input_size else ""
        raise UserError(f"backbone {name} cannot be built{size}: {error}") from None
    patch = _patch_size(backbone)
    if input_size and patch and input_size % patch:
        near = max(patch, round(input_size / patch) * patch)
        raise UserError(
            f"backbone {name} divides images into patches of {patch} px: input_size must be a multiple of {patch}, "
            f"such as {near}, not {input_size}"
        )
    return backbone


def timm_args(name: str, input_size: int | None) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for an input size. Raises UserError if there is no such model."""
    if name.startswith(HUB):
        config, saved = _from_hub(name)
        has_fixed_size = config.get("fixed_input_size", False) or "img_size" in saved
    else:
        registered = _registered(name)
        has_fixed_size = registered is not None and registered.fixed_input_size
    # timm then resamples the position embeddings that were trained at another size.
    return {"img_size": input_size} if input_size is not None and has_fixed_size else {}


def pretrained_config(name: str) -> dict[str, Any]:
    """timm's description of how a model was trained; empty if it has none. Raises UserError if there is no such
    model."""
    if name.startswith(HUB):
        return _from_hub(name)[0]
    registered = _registered(name)
    return {} if registered is None else registered.to_dict()


def _from_hub(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description of a model on the hub, and the arguments that it is built with."""
    try:
        config, _, saved = timm.models.load_model_config_from_hf(name.removeprefix(HUB))
    except Exception as error:  # the hub's client raises many types
        raise UserError(f"backbone {name} could not be read from the Hugging Face hub ({describe(error)})") from None
    return config, saved


@cache
def has_batch_norm(name: str) -> bool:
    """Whether a timm model has BatchNorm layers; True if that is not known without loading it.

    It is built without memory for its weights, which takes a fraction of a second.
    """
    try:
        with torch.device("meta"):
            net = timm.create_model(name, num_classes=0)
    except Exception:  # whatever is wrong with it is reported where the net is built
        return True
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def _registered(name: str) -> Any:
    """timm's description of a model's pretrained weights; None if it has none."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"see timm.list_models(), or write {HUB}OWNER/NAME"
        raise UserError(f"unknown backbone {name!r}: it must be a timm model name; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        model, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_models(f"{model}.*", include_tags=True)]
        raise UserError(f"backbone {model} has no weights {tag!r}; it has {', '.join(tags)}") from None


def _patch_size(backbone: nn.Module) -> int | None:
    """Side of the patches that a transformer divides images into; None if it has none or resizes them."""
    embed: Any = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if getattr(embed, "dynamic_img_pad", False) or size is None:
        return None
    return int(size if isinstance(size, int) else size[0])
