"""EmbeddingNet: a timm backbone, pooled features and a linear head turn images into embeddings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from timm.data import resolve_data_config, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.backbone import create_backbone, pretrained_config
from ray_dmml.models.blocks import freeze_blocks, frozen_modules
from ray_dmml.models.own_backbone import build_own_backbone, is_own_backbone
from ray_dmml.models.pooling import change_pooling
from ray_dmml.models.pretrained import load_initial_weights
from ray_dmml.randomness import seeded


class EmbeddingNet(nn.Module):
    """timm backbone -> pooled features -> linear head -> L2-normalised embedding.

    The net of a frozen peer whose weights contain no head has none: its embeddings are the pooled features.

    The net takes decoded uint8 images and scales them on its own device with the mean and standard deviation
    of the backbone's pretraining. So a transfer needs a quarter of the bytes of float32. Its weights are
    random; :func:`build_embedding_net` gives it those of the config.

    Raises:
        UserError: the backbone is unknown, or does not support the pooling or the input size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        backbone = config.backbone
        self.backbone: nn.Module = (
            build_own_backbone(config) if is_own_backbone(backbone) else create_backbone(backbone, config.input_size)
        )
        pretraining = resolve_model_data_config(self.backbone)
        self.input_size = size = config.input_size or int(pretraining["input_size"][-1])
        self.eval_crop = float(pretraining["crop_pct"])
        self.frozen = config.frozen
        self.frozen_batch_norm = config.batch_norm == "frozen"
        self.untrained_modules: tuple[nn.Module, ...] = ()
        """Modules that stay in evaluation mode, because they do not learn."""
        # Some timm models pool into more features than their num_features.
        self.backbone.eval()
        try:
            self.token_pool = change_pooling(self.backbone, backbone, config.pooling, size)
            with torch.no_grad():
                features = self.features(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"backbone {backbone} does not take {size} x {size} px images: {error}") from None
        if features.ndim != 2:
            raise UserError(f"backbone {backbone} gives no pooled feature vector and cannot be used")
        self.backbone.train()
        self.num_features = features.shape[1]
        self.head: nn.Module = nn.Linear(self.num_features, config.embedding_size)
        # Not persistent: the backbone's name determines them.
        for name in ("mean", "std"):
            values = torch.tensor(pretraining[name]).reshape(1, 3, 1, 1)
            self.register_buffer(name, values * 255, persistent=False)

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.head.out_features if isinstance(self.head, nn.Linear) else self.num_features

    @property
    def head_size(self) -> int:
        """D of the head; 0: there is none."""
        return self.embedding_size if isinstance(self.head, nn.Linear) else 0

    def resize_head(self, size: int) -> None:
        """Gives a frozen net the head that the weights need which are loaded next; 0: none.

        Nothing trains the head of such a net, so its size is that of its weights, whatever the config says.
        """
        if size == 0:
            self.head = nn.Identity()
        elif size != self.head_size:
            self.head = nn.Linear(self.num_features, size, device=self.mean.device)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32, rows of length 1."""
        return F.normalize(self.forward_unnormalized(images))

    def forward_unnormalized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32, the head's output before normalisation."""
        # Normalised in float32 whatever the autocast type: a half-precision norm is off by 1e-3.
        return self.head(self.backbone_features(images)).float()

    def backbone_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, F) float32, the pooled features before the head."""
        return self.features(standardize(images, self.mean, self.std)).float()

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, standardized -> (B, F) pooled features of the backbone."""
        backbone: Any = self.backbone
        if self.token_pool is None:
            return backbone(images)
        pooled = self.token_pool(backbone.forward_features(images))
        return backbone.fc_norm(pooled) if hasattr(backbone, "fc_norm") else pooled

    def train(self, mode: bool = True) -> EmbeddingNet:
        super().train(mode)
        if self.frozen_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        for module in self.untrained_modules:
            module.eval()
        return self


def input_of(config: PeerConfig) -> tuple[int, float]:
    """``input_size`` and ``eval_crop`` of a peer's net. A net of timm is not built for it, an own one is.

    Raises:
        UserError: the backbone is unknown, or an own one cannot be built.
    """
    if is_own_backbone(config.backbone):
        pretraining = resolve_model_data_config(build_own_backbone(config))
    else:
        pretraining = resolve_data_config({"in_chans": 3}, pretrained_config(config.backbone))
    return config.input_size or int(pretraining["input_size"][-1]), float(pretraining["crop_pct"])


def standardize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, minus ``mean`` and divided by ``std``, both (1, 3, 1, 1).

    It computes in place, because each new tensor of this size costs as much time as augmenting the image. It
    keeps the memory layout: a net in channels_last converts faster in its first convolution.
    """
    return images.to(torch.float32, copy=True).sub_(mean).div_(std)


def build_embedding_net(config: PeerConfig, run_seed: int, initial_weights: bool = True) -> EmbeddingNet:
    """Builds the net of a peer. ``run_seed`` and ``config.init_seed`` determine its random weights.

    ``initial_weights=False`` skips ``config.weights``, for a caller that loads other ones next.

    Raises:
        UserError: the backbone is unknown, or the weights are missing or do not fit.
    """
    init_seed = config.init_seed or 0
    with seeded(run_seed, init_seed, "init"):
        net = EmbeddingNet(config)
    # The head has a seed of its own, so it does not depend on the numbers that the backbone draws.
    with seeded(run_seed, init_seed, "head"):
        net.head = nn.Linear(net.num_features, config.embedding_size)
    if initial_weights:
        load_initial_weights(net, config)
    freeze_blocks(net.backbone, config)
    net.untrained_modules = frozen_modules(net.backbone)
    return net


def compiled(net: EmbeddingNet, name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``net.forward_unnormalized``, compiled at its first call, for training batches, which have one shape.

    Raises UserError with the peer's name if the device is a CPU and there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"{name}: compile: true needs a C++ compiler on a CPU, and {compiler} is not installed")
    return torch.compile(net.forward_unnormalized, dynamic=False)


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The mixed-precision context of a peer's net for ``PeerConfig.amp``."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
