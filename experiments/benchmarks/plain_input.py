"""Plain PyTorch: JPEG files to normalised views with Pillow and torchvision, one core.

    echo 4 | PYTHONPATH=experiments python -m benchmarks.plain_input FOLDER

does it four times, as four trainers would that know nothing of each other.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from benchmarks.worker import serve

DECODE_SIZE, INPUT_SIZE = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch(paths: list[Path]) -> Tensor:
    """(B, 3, 224, 224) float32."""
    pipeline = transforms.Compose(
        [
            transforms.Resize((DECODE_SIZE, DECODE_SIZE)),
            transforms.RandomResizedCrop(INPUT_SIZE, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = []
    for path in paths:
        with Image.open(path) as opened:
            images.append(pipeline(opened.convert("RGB")))
    return torch.stack(images)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    paths = sorted(Path(folder).rglob("*.jpg"))

    def work(num_peers: int) -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(num_peers):
            batch(paths)
        return {"images_per_s": len(paths) / (time.perf_counter() - began)}

    serve(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
