"""Table `export`: images/s of exported files in onnxruntime, and of PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.row import Settings, require
from ray_dmml.config.schema import PeerConfig
from ray_dmml.data.center_view import CenterView
from ray_dmml.exporting.embedder import Embedder, traced
from ray_dmml.exporting.onnx_file import load_onnx, write_onnx
from ray_dmml.models.embedding_net import build_embedding_net

BACKBONES = ("tf_efficientnet_lite0", "resnet50", "convnext_tiny", "vit_small_patch16_224")
DECODE_SIZE, INPUT_SIZE = 256, 224
BATCH_SIZES = (1, 32)
Embed = Callable[[Tensor], Tensor]


def export(settings: Settings) -> list[dict[str, Any]]:
    """A line for each backbone and batch size, decoded images of 256 px in, one thread. The weights are random."""
    torch.set_num_threads(1)
    return [line for backbone in BACKBONES for line in lines_of(backbone, settings.rounds)]


def lines_of(backbone: str, rounds: int) -> list[dict[str, Any]]:
    config = PeerConfig(name=backbone, backbone=backbone, input_size=INPUT_SIZE, embedding_size=512)
    net = build_embedding_net(config, 0).eval()
    net = net.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    view = CenterView(INPUT_SIZE, round(INPUT_SIZE / net.eval_crop), DECODE_SIZE)
    program = traced(Embedder([(view, net)], half=False), DECODE_SIZE, backbone)
    ways: dict[str, Embed] = {"PyTorch": torch.no_grad()(lambda images: net(view(images)))}
    with TemporaryDirectory(prefix="benchmark-") as folder:
        for name, quantise in (("ONNX fp32", False), ("ONNX int8", True)):
            file = Path(folder) / f"{name}.onnx"
            write_onnx(program, file, {}, quantise=quantise)
            ways[name] = load_onnx(file)
        images = torch.randint(0, 256, (2, 3, DECODE_SIZE, DECODE_SIZE), dtype=torch.uint8)
        difference = (ways["ONNX fp32"](images) - ways["PyTorch"](images)).abs().max()
        require(difference.item() <= 1e-4, "the file computes what PyTorch computes")
        return [line(backbone, ways, batch_size, rounds) for batch_size in BATCH_SIZES]


def line(backbone: str, ways: dict[str, Embed], batch_size: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds. In each round all ways take turns, after one batch that warms up."""
    images = torch.randint(0, 256, (batch_size, 3, DECODE_SIZE, DECODE_SIZE), dtype=torch.uint8)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for embed in ways.values():
        embed(images)
    for _ in range(rounds):
        for name, embed in ways.items():
            began = time.perf_counter()
            embed(images)
            rates[name].append(batch_size / (time.perf_counter() - began))
    speeds = {f"{name}, images/s": median(values) for name, values in rates.items()}
    ratios = {f"{name} / PyTorch": f"{median(ratios_of(rates, name)):.2f}" for name in ways if name != "PyTorch"}
    return {"backbone": backbone, "batch": str(batch_size), **speeds, **ratios}


def ratios_of(rates: dict[str, list[float]], name: str) -> list[float]:
    """One a round."""
    return [rate / plain for rate, plain in zip(rates[name], rates["PyTorch"], strict=True)]
