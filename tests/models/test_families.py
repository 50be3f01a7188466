"""Weights as timm publishes them, of one small net of each family: they load, and the features are timm's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from test_embedding_net import peer, require
from torch import Tensor

from ray_dmml.models.embedding_net import build_embedding_net

QUICK = [
    ("test_resnet", 32),
    ("test_efficientnet", 32),
    ("test_convnext", 32),
    ("test_vit", 64),  # class token
    ("test_vit3", 64),  # attention pooling, as SigLIP
    ("test_maxvit", 64),  # a hybrid
]
FAMILIES = [
    ("resnet10t", 64),
    ("resnetv2_50", 64),
    ("regnetx_002", 64),
    ("efficientnet_b0", 64),
    ("mobilenetv3_small_050", 64),
    ("convnext_atto", 64),
    ("convnextv2_atto", 64),
    ("swin_tiny_patch4_window7_224", 224),
    ("swinv2_cr_tiny_ns_224", 224),
    ("vit_tiny_patch16_224", 96),
    ("deit_tiny_patch16_224", 96),
    ("deit_tiny_distilled_patch16_224", 96),
    ("deit3_small_patch16_224", 96),
    ("beit_base_patch16_224", 96),
    ("vit_small_patch14_dinov2.lvd142m", 98),
    ("vit_small_patch14_reg4_dinov2", 98),
    ("vit_small_patch16_dinov3", 96),
    ("vit_base_patch32_siglip_256", 96),
    ("vit_base_patch16_clip_224.openai", 96),
    ("eva02_tiny_patch14_224", 98),
    ("levit_128s", 224),
    ("maxvit_rmlp_pico_rw_256", 256),
    ("coatnet_pico_rw_224", 224),
    ("coat_lite_tiny", 64),
    ("vit_tiny_r_s16_p8_224", 96),
    ("mobilevit_xxs", 64),
    ("mixer_s32_224", 224),
]


def published(name: str, path: Path) -> None:
    """Writes weights of timm's default net, with its classifier, in which no layer has its initial values."""
    generator = torch.Generator().manual_seed(0)

    def moved(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        change = 0.02 * torch.randn(value.shape, generator=generator)
        return value + torch.where(value == 1, change.abs(), change)  # variances stay positive

    state = {key: moved(value).contiguous() for key, value in timm.create_model(name).state_dict().items()}
    safetensors.torch.save_file(state, path)


@pytest.mark.parametrize(
    ("name", "size"), [*QUICK, *(pytest.param(*family, marks=pytest.mark.slow) for family in FAMILIES)]
)
def test_features_are_those_of_timm(tmp_path: Path, name: str, size: int) -> None:
    """timm loads the file into its own net of this input size; what it gives before its classifier is expected."""
    require(name)
    path = tmp_path / "published.safetensors"
    published(name, path)
    net = build_embedding_net(peer(backbone=name, weights=str(path), input_size=size), 0).eval()
    args = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    overlay = {"file": str(path)}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        features = net.features(images)
    assert features.abs().max() > 0
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
