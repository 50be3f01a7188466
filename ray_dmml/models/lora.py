"""Low-rank adapters (LoRA): the backbone keeps its weights, and small matrices beside some of its layers learn.

An adapted layer computes W x + alpha/rank * B A x. Only A and B learn, and B starts at 0. The ``state_dict`` of an
adapted net has the names of a plain one and the merged weights W + alpha/rank * B A, so whoever loads it needs no
adapters. What training goes on from is :func:`adapter_state`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.blocks import frozen_modules
from ray_dmml.models.embedding_net import EmbeddingNet
from ray_dmml.randomness import seeded

_ADAPTER = "default"  # peft's name for the only adapter of a layer
_PARTS = ("lora_A", "lora_B")


def add_adapters(net: EmbeddingNet, config: PeerConfig, run_seed: int) -> None:
    """Adds the adapters that ``config.lora`` asks for, and freezes the rest of the backbone.

    Raises:
        UserError: peft is not installed, or the backbone has no such layers, or does not call them as modules.
    """
    lora = config.lora
    if lora is None:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"{config.name}: lora needs the extra: pip install 'ray-dmml[lora]' ({error})") from None
    _require_layers(net.backbone, config, lora.targets)
    with seeded(run_seed, config.init_seed or 0, "lora"):
        try:
            asked = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
            inject_adapter_in_model(asked, net.backbone)
        except ValueError as error:  # such as a rank that does not fit the groups of a convolution
            raise _cannot_adapt(net.backbone, config, str(error).splitlines()[0]) from None
    _require_gradients(net, config)
    net.backbone.register_state_dict_post_hook(_merge)
    net.backbone.register_load_state_dict_pre_hook(_split)
    net.untrained_modules = frozen_modules(net.backbone)


def adapter_state(net: EmbeddingNet) -> dict[str, Tensor]:
    """The weights W, A and B of every adapted layer, by name, and its alpha/rank; empty without adapters. The tensors
    W, A and B are the net's."""
    state = {}
    for name, layer in _adapted(net.backbone):
        for part, tensor in {"weight": layer.base_layer.weight, **_matrices(layer)}.items():
            state[f"{name}.{part}"] = tensor.detach()
        state[f"{name}.scaling"] = torch.tensor(layer.scaling[_ADAPTER], dtype=torch.float64)
    return state


def load_adapter_state(net: EmbeddingNet, state: Mapping[str, Tensor]) -> None:
    """Puts W, A and B of :func:`adapter_state` into a net that holds the merged weights. A net with adapters of other
    layers, rank or alpha keeps the merged ones."""
    own = adapter_state(net)
    if _kind(own) != _kind(state):
        return
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _kind(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: value.item() if key.endswith(".scaling") else value.shape for key, value in state.items()}


def _adapted(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in backbone.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module


def _matrices(layer: Any) -> dict[str, Tensor]:
    return {part: getattr(layer, part)[_ADAPTER].weight for part in _PARTS}


def _merge(backbone: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Turns the state of an adapted backbone into that of a plain one."""
    for name, layer in _adapted(backbone):
        at = f"{prefix}{name}."
        for part in _PARTS:
            del state[f"{at}{part}.{_ADAPTER}.weight"]
        with torch.no_grad():
            state[f"{at}weight"] = state.pop(f"{at}base_layer.weight") + layer.get_delta_weight(_ADAPTER)
        if layer.base_layer.bias is not None:
            state[f"{at}bias"] = state.pop(f"{at}base_layer.bias")


def _split(backbone: nn.Module, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    """Turns the state of a plain backbone into that of an adapted one, whose adapters then change nothing."""
    for name, layer in _adapted(backbone):
        at = f"{prefix}{name}."
        for part in ("weight", "bias"):
            if f"{at}{part}" in state:
                state[f"{at}base_layer.{part}"] = state.pop(f"{at}{part}")
        matrices = _matrices(layer)
        state[f"{at}lora_A.{_ADAPTER}.weight"] = matrices["lora_A"].detach()
        state[f"{at}lora_B.{_ADAPTER}.weight"] = torch.zeros_like(matrices["lora_B"])


def _require_layers(backbone: nn.Module, config: PeerConfig, targets: Sequence[str]) -> None:
    """Raises UserError unless the targets are linear and convolutional layers; names are compared as by peft."""
    ends = tuple(f".{target}" for target in targets)
    chosen = {name: module for name, module in backbone.named_modules() if f".{name}".endswith(ends)}
    if not chosen:
        raise _cannot_adapt(backbone, config, "no layer has such a name")
    for name, module in chosen.items():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise _cannot_adapt(backbone, config, f"{name} is a {type(module).__name__}")


def _require_gradients(net: EmbeddingNet, config: PeerConfig) -> None:
    """Raises UserError for adapters without effect: some nets read the weight of a layer and never call the layer."""
    adapters = {name: _matrices(layer)["lora_B"] for name, layer in _adapted(net.backbone)}
    net.eval()
    output = net.backbone_features(torch.zeros(1, 3, net.input_size, net.input_size, dtype=torch.uint8))
    gradients = torch.autograd.grad(output.sum(), list(adapters.values()), allow_unused=True)
    net.train()
    without = [name for name, gradient in zip(adapters, gradients, strict=True) if gradient is None]
    if without:
        raise _cannot_adapt(net.backbone, config, f"{without[0]} is never called as a layer")


def _cannot_adapt(backbone: nn.Module, config: PeerConfig, reason: str) -> UserError:
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    ends = sorted({name.rpartition(".")[2] for name in layers})
    names = ", ".join(name for name in ends if not name.isdigit()) or "by numbers only"
    targets = ", ".join(config.lora.targets) if config.lora else ""
    return UserError(
        f"{config.name}: lora.targets {targets} do not fit {config.backbone}: {reason}; its linear and convolutional "
        f"layers are named {names}"
    )
