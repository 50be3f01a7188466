"""Rows `step-views`, `gpu-views` and `gpu-plain`: a peer's step with its images made by view workers.

    echo 20 | PYTHONPATH=experiments python -m benchmarks.views FOLDER SETTINGS VIEW LOADERS

is the plain competitor of `gpu-plain`: the same net, loss and view in a loop as anybody would write it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.jpegs import training_folder, write_classes
from benchmarks.row import Goal, Row, Settings, in_turn
from benchmarks.worker import Worker, serve
from ray_dmml.config.loading import read_settings
from ray_dmml.config.schema import Config
from ray_dmml.data.augmentations import training_view
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import Batch, DecodedBatches, build_sampler
from ray_dmml.data.view_loader import ViewLoader
from ray_dmml.losses.metric import MetricLoss
from ray_dmml.models.embedding_net import EmbeddingNet, autocast
from ray_dmml.peer.build import build_peer, build_view_loader
from ray_dmml.peer.peer import Peer

VIEWS = ("weak", "standard", "strong")
WARM_UP, COUNT = 8, 16
"""Steps of a round that are not measured, and that are. The first ones have batches that workers made meanwhile."""

PLAIN_LOADERS = 8
CUB200 = Path(__file__).parent.parent / "configs" / "cub200.yaml"


class TimedPeer:
    """A peer with a teacher, and its loader."""

    def __init__(self, peer: Peer, loader: ViewLoader, batch_size: int) -> None:
        self._peer, self._loader, self._step = peer, loader, 0
        generator = torch.Generator().manual_seed(0)
        teacher = F.normalize(torch.randn(batch_size, 128, generator=generator))
        self._teachers = [teacher.to(peer.device)]
        self._ready = loader.batch(0)

    def step_ms(self) -> float:
        """Of a step with the next batch."""
        return self._median(None)

    def ready_ms(self) -> float:
        """Of a step with a batch that is there."""
        return self._median(lambda step: Batch(step, self._ready.images, self._ready.labels, self._ready.indices))

    def images_per_s(self) -> float:
        return 1e3 * len(self._ready.labels) / self.step_ms()

    def run(self, count: int, batch_of: Callable[[int], Batch] | None = None) -> list[float]:
        """The seconds of each of the next steps."""
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            out = self._peer.forward((batch_of or self._loader.batch)(self._step))
            self._peer.step(out, self._peer.metric_loss(out), self._teachers)
            if self._peer.device.type == "cuda":
                torch.cuda.synchronize()
            self._step += 1
            seconds.append(time.perf_counter() - began)
        return seconds

    def _median(self, batch_of: Callable[[int], Batch] | None) -> float:
        return 1e3 * median(self.run(WARM_UP + COUNT, batch_of)[WARM_UP:])


@contextmanager
def timed_peer(config: Config, num_workers: int, device: torch.device) -> Iterator[TimedPeer]:
    splits = load_splits(config.data)
    sampler = build_sampler(config, splits)
    with closing(DecodedBatches(splits.train, sampler)) as decoded:
        loader = build_view_loader(config, 0, splits, decoded, device, num_workers=num_workers, threads=1)
        with closing(loader):
            yield TimedPeer(build_peer(config, 0, splits.train.num_classes, device, True), loader, sampler.batch_size)


def _rows(name: str, raw: dict[str, Any], num_workers: int, device: torch.device, rounds: int) -> list[Row]:
    rows = []
    for view in VIEWS:
        raw["cohort"]["peers"] = [{"view": view}]
        with timed_peer(Config.parse(raw), num_workers, device) as timed:
            a, b = in_turn(rounds, timed.step_ms, timed.ready_ms)
        workers = "one view worker" if num_workers == 1 else f"{num_workers} view workers"
        what = f"step of a peer with {workers}, view {view} / the same with a ready batch"
        rows.append(Row(name, what, "ms", a, b, Goal("A/B", "<=", 1.1)))
    return rows


def step_views(settings: Settings) -> list[Row]:
    """One peer on one core, and its worker on the other."""
    torch.set_num_threads(1)
    with training_folder(settings.data_root) as folder:
        raw = {
            "data": {
                **{"name": "imagefolder", "root": str(folder), "decode_size": 112, "check_images": False},
                **{"classes_per_batch": 16, "images_per_class": 4, "validation_fraction": 0},
            },
            "cohort": {"base": {"backbone": "tf_efficientnet_lite0", "embedding_size": 128, "input_size": 96}},
        }
        return _rows("step-views", raw, 1, torch.device("cpu"), settings.rounds)


def published_settings(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Those of `cub200.yaml` on a folder of images; `tiny`: with a net and images for a trial on a CPU."""
    raw = read_settings(CUB200, [])
    raw["data"] |= {"name": "imagefolder", "root": str(folder), "validation_fraction": 0, "check_images": False}
    raw["cohort"]["base"] |= {"weights": "none"}  # take the same time
    if tiny:
        raw["data"] |= {"decode_size": 40, "classes_per_batch": 4, "images_per_class": 3}
        raw["cohort"]["base"] |= {"backbone": "test_resnet", "input_size": 32, "embedding_size": 16, "amp": "off"}
    return raw


@contextmanager
def photo_folder(*, tiny: bool) -> Iterator[Path]:
    """Classes for training (the first half) and as many others, of JPEGs of 500 px."""
    side, num_classes = (48, 10) if tiny else (500, 60)
    with TemporaryDirectory(prefix="benchmark-") as name:
        write_classes(Path(name), num_classes, 6, side, side)
        yield Path(name)


def gpu_views(settings: Settings, *, tiny: bool = False) -> list[Row]:
    """The published setting on a GPU, with a worker on each core but one."""
    if not (tiny or torch.cuda.is_available()):
        print("gpu-views: skipped, because there is no GPU", file=sys.stderr)
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with photo_folder(tiny=tiny) as folder:
        num_workers = 1 if tiny else 15
        return _rows("gpu-views", published_settings(folder, tiny=tiny), num_workers, device, settings.rounds)


def gpu_plain(settings: Settings, *, tiny: bool = False) -> list[Row]:
    """Images a second of a peer without teachers, and of a plain loop; both with eight loading processes."""
    if not (tiny or torch.cuda.is_available()):
        print("gpu-plain: skipped, because there is no GPU", file=sys.stderr)
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaders, rows = 1 if tiny else PLAIN_LOADERS, []
    with photo_folder(tiny=tiny) as folder:
        raw = published_settings(folder, tiny=tiny)
        raw["loss"]["relational"] |= {"distance_weight": 0, "angle_weight": 0}
        for view in VIEWS:
            raw["cohort"]["peers"] = [{"view": view}]
            with (
                timed_peer(Config.parse(raw), loaders, device) as timed,
                Worker("views", str(folder), json.dumps(raw), view, str(loaders)) as plain,
            ):

                def plain_rate(worker: Worker = plain) -> float:
                    worker.ask(WARM_UP + COUNT)
                    return float(worker.answer()["images_per_s"])

                a, b = in_turn(settings.rounds, timed.images_per_s, plain_rate)
            what = f"images/s of a peer, view {view} / plain PyTorch, both with {loaders} loading processes"
            rows.append(Row("gpu-plain", what, "images/s", a, b, Goal("A/B", ">=", 1.0)))
    return rows


def plain_loop(folder: str, settings: str, view: str, loaders: str) -> None:
    """One net that learns from labels: ImageFolder, MPerClassSampler, DataLoader, Adam."""
    torch.set_num_threads(1)
    config = Config.parse(json.loads(settings))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    [peer], data = config.cohort.peers, config.data
    torch.manual_seed(0)
    net = EmbeddingNet(peer).to(device).to(memory_format=torch.channels_last).train()
    metric = MetricLoss(config.loss.metric, num_classes=2, embedding_size=peer.embedding_size)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5, weight_decay=1e-5)
    size = data.classes_per_batch * data.images_per_class
    pipeline = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize([data.decode_size] * 2),
            training_view(view, net.input_size, data.decode_size, "the peer").pipeline,
        ]
    )
    images = ImageFolder(folder, transform=pipeline, loader=_open)
    sampler = MPerClassSampler(images.targets, data.images_per_class, size, length_before_new_iter=10_000 * size)
    loader = DataLoader(
        images, size, sampler=sampler, num_workers=int(loaders), pin_memory=device.type == "cuda", prefetch_factor=2
    )
    batches = iter(loader)

    def steps(count: int) -> dict[str, float]:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            batch, labels = next(batches)
            with autocast(peer.amp, device):
                embedding = net(batch.to(device, non_blocking=True, memory_format=torch.channels_last))
            loss = metric(embedding, labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return {"images_per_s": size / median(seconds[WARM_UP:])}

    serve(steps)


def _open(path: str) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


if __name__ == "__main__":
    plain_loop(*sys.argv[1:])
