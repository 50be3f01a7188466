"""How the feature map or the tokens of a backbone become one vector, without a trained layer being lost."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from ray_dmml.errors import UserError

GEM_POWER = 3.0
"""The power p of generalised-mean pooling (Radenovic et al. 2018, https://arxiv.org/abs/1711.02512)."""


def generalized_mean(values: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """(mean of x^p)^(1/p) over ``dim``. Negative values count as 0, as is usual."""
    return values.clamp(min=1e-6).pow(GEM_POWER).mean(dim, keepdim=keepdim).pow(1 / GEM_POWER)


class MapGem(nn.Module):
    """Generalised-mean pooling in the place of timm's pooling of a feature map.

    Args:
        dim: the two dimensions of the places, (2, 3) for (B, C, H, W).
        keepdim: whether they stay in the result, with size 1.
    """

    def __init__(self, dim: tuple[int, int], *, keepdim: bool) -> None:
        super().__init__()
        self._dim, self._keepdim = dim, keepdim

    def forward(self, feature_map: Tensor) -> Tensor:
        return generalized_mean(feature_map, self._dim, self._keepdim)


class TokenPool(nn.Module):
    """Pools the tokens of a transformer: (B, N, C) -> (B, C).

    ``token`` takes the class token. The others pool the tokens of the patches, without the class token and registers.
    """

    def __init__(self, pooling: str, num_prefix_tokens: int) -> None:
        super().__init__()
        self._pooling, self._num_prefix_tokens = pooling, num_prefix_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self._num_prefix_tokens :]
        match self._pooling:
            case "token":
                return tokens[:, 0]
            case "avg":
                return patches.mean(dim=1)
            case "max":
                return patches.amax(dim=1)
            case "avgmax":
                return (patches.mean(dim=1) + patches.amax(dim=1)) / 2
            case _:
                return generalized_mean(patches, 1)


def change_pooling(backbone: Any, name: str, pooling: str, size: int) -> TokenPool | None:
    """Gives a backbone another pooling than the one that it was trained with.

    The pooling module of a feature map is exchanged inside the backbone, so that the trained layers after it stay.
    For a transformer, the result pools what ``forward_features`` returns; its ``fc_norm``, if it has one, comes next.

    Args:
        backbone: a timm model without classifier.
        name: its name, for errors.
        pooling: ``native`` changes nothing.
        size: side of the images in pixels.

    Raises:
        UserError: the backbone has nothing that can be pooled this way, or would lose a trained layer.
    """
    if pooling in ("native", getattr(backbone, "global_pool", None)):
        return None
    refused = f"backbone {name} cannot have pooling: {pooling}"
    pools = [path for path, module in backbone.named_modules() if isinstance(module, SelectAdaptivePool2d)]
    if len(pools) == 1:
        if pooling == "token":
            raise UserError(f"{refused}: it has a feature map and no class token")
        parent, _, attribute = pools[0].rpartition(".")
        module = backbone.get_submodule(parent)
        setattr(module, attribute, _pooling_like(getattr(module, attribute), pooling))
        return None
    with torch.no_grad():
        tokens = backbone.forward_features(torch.zeros(1, 3, size, size))
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise UserError(f"{refused}: it has neither a plain feature map nor tokens; use native")
    if pooling == "token" and getattr(backbone, "cls_token", None) is None:
        raise UserError(f"{refused}: it has no class token")
    if lost := _trained_layers_after(backbone, tokens) - {"fc_norm"}:
        raise UserError(f"{refused}: its trained layer {min(lost)} would be lost; use native")
    return TokenPool(pooling, getattr(backbone, "num_prefix_tokens", 0))


def _pooling_like(old: nn.Module, pooling: str) -> nn.Module:
    """A pooling of a feature map with the layout of its input, and the shape of its result, of another one."""
    if getattr(old, "pool_type", None) == pooling:
        return old
    result = old(torch.zeros(1, 2, 3, 4))
    is_nchw, is_flat = result.shape[1] == 2, result.ndim == 2
    if pooling == "gem":
        return MapGem((2, 3) if is_nchw else (1, 2), keepdim=not is_flat)
    layout = "NCHW" if is_nchw else "NHWC"
    return SelectAdaptivePool2d(pool_type=pooling, flatten=is_flat, input_fmt=layout)


def _trained_layers_after(backbone: Any, tokens: Tensor) -> set[str]:
    """Names of the modules with parameters of their own that pool the tokens."""
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    layers = [(n, m) for n, m in backbone.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in layers]
    try:
        with torch.no_grad():
            backbone.forward_head(tokens, pre_logits=True)
    finally:
        for hook in hooks:
            hook.remove()
    return called
