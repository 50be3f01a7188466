"""The competitors in plain PyTorch, without Ray: trainers, an exchange of embeddings, an input pipeline.

    echo 10 | PYTHONPATH=experiments python -m benchmarks.plain independent FOLDER SEED LOADERS
    echo 10 | PYTHONPATH=experiments python -m benchmarks.plain sequential FOLDER LOADERS
    echo 10 > steps
    PYTHONPATH=experiments torchrun --nproc-per-node 2 -m benchmarks.plain mutual FOLDER LOADERS < steps

train 10 steps each. Trainers share the net and the losses with this package and nothing else: their
data come from torchvision's ImageFolder, a DataLoader and pytorch-metric-learning's sampler, and Adam
is torch's. The `exchange` program needs torchrun, too, and `input` a FOLDER of JPEG files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.worker import serve
from ray_dmml.config.schema import MetricLossConfig, PeerConfig
from ray_dmml.losses.metric import MetricLoss
from ray_dmml.losses.relational import relational_losses
from ray_dmml.models.embedding_net import EmbeddingNet

BACKBONE, BATCH_NORM = "tf_efficientnet_lite0", "train"
DECODE_SIZE, INPUT_SIZE, EMBEDDING_SIZE = 112, 96, 128
CLASSES_PER_BATCH, IMAGES_PER_CLASS = 16, 4
BATCH_SIZE = CLASSES_PER_BATCH * IMAGES_PER_CLASS
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

PHOTO_DECODE_SIZE, PHOTO_INPUT_SIZE = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Views:
    """Makes ``count`` random views of a decoded image, one for each net."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._resize = v2.Resize((DECODE_SIZE, DECODE_SIZE))
        self._view = v2.Compose([v2.RandomResizedCrop(INPUT_SIZE, scale=(0.2, 1.0)), v2.RandomHorizontalFlip()])

    def __call__(self, image: Tensor) -> list[Tensor]:
        decoded = self._resize(image)
        return [self._view(decoded) for _ in range(self._count)]


def _read(path: str) -> Tensor:
    return decode_image(path, mode=ImageReadMode.RGB)


def batches(folder: str, num_views: int, view_seed: int, loaders: int) -> Iterator[Any]:
    """Endless ([views: (B, 3, H, H) uint8], labels (B,) int64) of the first half of the classes.

    All processes draw the same images, whatever their ``view_seed``.

    Args:
        loaders: number of processes that load; 0 loads in this one.
    """
    images = ImageFolder(folder, transform=Views(num_views), loader=_read)
    num_classes = len(images.classes) // 2
    chosen = [i for i, label in enumerate(images.targets) if label < num_classes]
    sampler = MPerClassSampler(
        [images.targets[i] for i in chosen],
        m=IMAGES_PER_CLASS,
        batch_size=BATCH_SIZE,
        length_before_new_iter=10_000 * BATCH_SIZE,
    )
    np.random.seed(0)  # the sampler uses this generator
    torch.manual_seed(view_seed)
    return iter(
        DataLoader(
            Subset(images, chosen),
            BATCH_SIZE,
            sampler=sampler,
            num_workers=loaders,
            pin_memory=DEVICE.type == "cuda",
        )
    )


class Trainee:
    """A net with its metric loss and its optimiser."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        peer = PeerConfig(
            backbone=BACKBONE, embedding_size=EMBEDDING_SIZE, batch_norm=BATCH_NORM, input_size=INPUT_SIZE
        )
        self.net = EmbeddingNet(peer).to(DEVICE).to(memory_format=torch.channels_last).train()
        config = MetricLossConfig.model_validate({})
        # The triplet loss has no proxies, so the number of classes does not matter.
        self.metric = MetricLoss(config, num_classes=2, embedding_size=EMBEDDING_SIZE)
        self._optimizer = torch.optim.Adam(self.net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, H) uint8 -> (B, D)."""
        return self.net(images.to(DEVICE, non_blocking=True, memory_format=torch.channels_last))

    def update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


def independent(folder: str, seed: str, loaders: str) -> None:
    """One net that learns alone. Two of these at the same time never communicate."""
    torch.set_num_threads(1)
    trainee = Trainee(seed=int(seed))
    data = batches(folder, num_views=1, view_seed=int(seed), loaders=int(loaders))

    def steps(count: int) -> dict[str, float]:
        loss = torch.zeros(())
        for _ in range(count):
            (images,), labels = next(data)
            loss = trainee.metric(trainee.embed(images), labels.to(DEVICE))
            trainee.update(loss)
        return {"loss": float(loss.detach())}

    serve(steps)


def sequential(folder: str, loaders: str) -> None:
    """Mutual learning in one process that trains two nets in turn. An image is decoded once for both."""
    torch.set_num_threads(2)
    trainees = [Trainee(seed=seed) for seed in range(2)]
    data = batches(folder, num_views=2, view_seed=0, loaders=int(loaders))

    def steps(count: int) -> dict[str, float]:
        loss = torch.zeros(())
        for _ in range(count):
            views, labels = next(data)
            labels = labels.to(DEVICE)
            embeddings = [t.embed(view) for t, view in zip(trainees, views, strict=True)]
            published = [embedding.detach() for embedding in embeddings]
            for i, (trainee, embedding) in enumerate(zip(trainees, embeddings, strict=True)):
                mutual = relational_losses(embedding, [published[1 - i]])
                loss = trainee.metric(embedding, labels) + mutual.distance + 2 * mutual.angle
                trainee.update(loss)
        return {"loss": float(loss.detach())}

    serve(steps)


def mutual(folder: str, loaders: str) -> None:
    """Mutual learning by torch.distributed, one process a net: NCCL if each has a GPU, else gloo."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if torch.cuda.device_count() >= 2 else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    trainee = Trainee(seed=rank)
    data = batches(folder, num_views=1, view_seed=rank, loaders=int(loaders))
    received = [torch.empty(BATCH_SIZE, EMBEDDING_SIZE, device=DEVICE) for _ in range(world)]

    def steps(count: int) -> dict[str, float]:
        loss = torch.zeros(())
        for _ in range(count):
            (images,), labels = next(data)
            embedding = trainee.embed(images)
            exchange = dist.all_gather(received, embedding.detach(), async_op=True)
            loss = trainee.metric(embedding, labels.to(DEVICE))
            exchange.wait()
            others = received[:rank] + received[rank + 1 :]
            terms = relational_losses(embedding, others)
            loss = loss + terms.distance + 2 * terms.angle
            trainee.update(loss)
        return {"loss": float(loss.detach())}

    serve(steps)
    dist.destroy_process_group()


def exchange(num_rows: str, size: str) -> None:
    """Exchanges (num_rows, size) float32 embeddings by gloo."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sent = torch.randn(int(num_rows), int(size))
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size())]

    def exchanges(count: int) -> dict[str, float]:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            dist.all_gather(received, sent)
        return {"seconds": (time.perf_counter() - began) / count}

    serve(exchanges)
    dist.destroy_process_group()


def input_pipeline(folder: str) -> None:
    """JPEG files to normalised views with Pillow and torchvision, as often as there are peers."""
    torch.set_num_threads(1)
    paths = sorted(Path(folder).rglob("*.jpg"))

    def work(num_peers: int) -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(num_peers):
            _photo_batch(paths)
        return {"images_per_s": len(paths) / (time.perf_counter() - began)}

    serve(work)


def _photo_batch(paths: list[Path]) -> Tensor:
    """(B, 3, 224, 224) float32."""
    pipeline = transforms.Compose(
        [
            transforms.Resize((PHOTO_DECODE_SIZE, PHOTO_DECODE_SIZE)),
            transforms.RandomResizedCrop(PHOTO_INPUT_SIZE, scale=(0.2, 1.0)),
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


PROGRAMS: dict[str, Callable[..., None]] = {
    "independent": independent,
    "sequential": sequential,
    "mutual": mutual,
    "exchange": exchange,
    "input": input_pipeline,
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
