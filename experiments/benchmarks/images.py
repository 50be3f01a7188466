"""Row `input`: from JPEG files to the normalised views of four peers, on one core."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from benchmarks.jpegs import write_classes
from benchmarks.row import Goal, Row, Settings, in_turn
from ray_dmml.data.images import FileImages
from ray_dmml.data.views import training_view

NUM_PEERS, NUM_IMAGES = 4, 64
SIDE, DECODE_SIZE, INPUT_SIZE = 500, 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pillow_batch(paths: list[Path]) -> Tensor:
    """One peer's batch by the usual pipeline."""
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


def our_batches(paths: list[Path]) -> list[Tensor]:
    """The batches of all peers. Every peer still decodes for itself; the net normalises."""
    mean, std = (255 * torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    source = FileImages(paths[0].parent, [path.name for path in paths], DECODE_SIZE)
    found = []
    for peer in range(NUM_PEERS):
        view = training_view("standard", INPUT_SIZE, DECODE_SIZE, f"peer{peer}")
        decoded = torch.stack([source.read(i) for i in range(len(source))])
        found.append((view(decoded) - mean) / std)
    return found


def input_row(settings: Settings) -> list[Row]:
    """Images a second and core; an image is one file that becomes four views."""
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="benchmark-") as name:
        write_classes(Path(name), 1, NUM_IMAGES, SIDE, SIDE)
        paths = sorted(Path(name).rglob("*.jpg"))

        def ours() -> float:
            began = time.perf_counter()
            our_batches(paths)
            return NUM_IMAGES / (time.perf_counter() - began)

        def pillow() -> float:
            began = time.perf_counter()
            for _ in range(NUM_PEERS):
                pillow_batch(paths)
            return NUM_IMAGES / (time.perf_counter() - began)

        a, b = in_turn(settings.rounds, ours, pillow)
    what = "500 px JPEGs to 4 peers' views of 224 px / each with PIL and torchvision"
    return [Row("input", what, "images/s/core", a, b, Goal("A/B", ">=", 3))]
