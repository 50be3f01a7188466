"""Rows `embed` and `embed-local`: JPEG files to embeddings in files, on all cores.

    echo 1 | PYTHONPATH=experiments python -m benchmarks.embed ray RUN FOLDER

embeds the images of a folder once, on Ray, `local`ly, or in a `plain` loop: timm, torchvision's transforms and a
DataLoader with a process for each core but one, or none, whichever is faster here. Each side's libraries are loaded and
Ray runs before the clock starts. The actors of a call start within its time, as the DataLoader's processes do.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.jpegs import write_classes
from benchmarks.row import Goal, Row, Settings, in_turn, require
from benchmarks.worker import Worker, serve
from ray_dmml import Config, embed, load_cohort, train
from ray_dmml.cores import num_cores

BACKBONE, DECODE_SIZE, BATCH_SIZE = "tf_efficientnet_lite0", 256, 64
NUM_DIFFERENT, NUM_LINKS, SIDE = 64, 40, 500  # each file has further names, so that the disk does not matter
NUM_IMAGES = NUM_DIFFERENT * NUM_LINKS


def embed_on_ray(settings: Settings) -> list[Row]:
    """On Ray, the start of its actors included."""
    what = "500 px JPEGs to embeddings in files, by Ray Data / timm and a DataLoader"
    return [_row(settings, "embed", what, "ray", 0.95)]


def embed_local(settings: Settings) -> list[Row]:
    """In one process."""
    what = "the same in one process / timm and a DataLoader"
    return [_row(settings, "embed-local", what, "local", 1.0)]


def _row(settings: Settings, name: str, what: str, which: str, goal: float) -> Row:
    with TemporaryDirectory(prefix="benchmark-") as folder, ExitStack() as stack:
        run, images = _prepare(Path(folder))
        programs = {kind: (kind, str(run), str(images)) for kind in (which, "plain", "plain-loaders")}
        workers = {
            kind: stack.enter_context(Worker("embed", *arguments, threads=1 if kind != "plain" else num_cores()))
            for kind, arguments in programs.items()
        }

        def rate(kind: str) -> float:
            workers[kind].ask(1)
            answer = workers[kind].answer()
            embeddings[kind] = np.asarray(answer["some"])
            return float(answer["images_per_s"])

        embeddings: dict[str, np.ndarray] = {}
        best = max(("plain", "plain-loaders"), key=rate)
        rate(which)
        gap = float(np.abs(embeddings[which] - embeddings[best]).max())
        require(gap < 1e-4, f"both sides have the same embeddings (they differ by {gap:.2g})")
        a, b = in_turn(settings.rounds, lambda: rate(which), lambda: rate(best))
        return Row(name, what, "images/s", a, b, Goal("A/B", ">=", goal), {"competitor": best, "images": NUM_IMAGES})


def _prepare(folder: Path) -> tuple[Path, Path]:
    """A run of one peer, and a folder of photographs."""
    images, classes = folder / "images", folder / "classes"
    write_classes(folder / "photographs", 1, NUM_DIFFERENT, SIDE, SIDE)
    images.mkdir()
    for file in (folder / "photographs").rglob("*.jpg"):
        for number in range(NUM_LINKS):
            (images / f"{file.stem}-{number:02d}.jpg").hardlink_to(file)
    write_classes(classes, 4, 4, 64, 64)
    data = {"name": "imagefolder", "root": str(classes), "decode_size": DECODE_SIZE, "validation_fraction": 0}
    raw: dict[str, Any] = {
        "data": data | {"classes_per_batch": 2, "images_per_class": 2},
        "cohort": {"peers": [{"backbone": BACKBONE, "embedding_size": 128}]},
        "train": {"steps": 1, "evaluate_every": 0, "report": False},
    }
    train(Config.parse(raw), folder / "run", local=True, progress=False)
    return folder / "run", images


class Photos(Dataset[torch.Tensor]):
    """As anybody would write it."""

    def __init__(self, paths: list[Path], decode_size: int, input_size: int) -> None:
        self.paths = [str(path) for path in paths]
        self.transform = v2.Compose([v2.Resize((decode_size, decode_size)), v2.CenterCrop(input_size)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(decode_image(self.paths[index], mode=ImageReadMode.RGB))


class PlainLoop:
    """timm's backbone with the run's weights and head."""

    def __init__(self, run: str, loaders: int) -> None:
        (peer,) = load_cohort(run).peers.values()
        self.net = timm.create_model(BACKBONE, num_classes=0).eval().to(memory_format=torch.channels_last)
        self.net.load_state_dict(peer.net.backbone.state_dict(), strict=False)
        self.head, self.input_size, self.loaders = peer.net.head, peer.net.input_size, loaders
        self.mean, self.std = peer.net.mean, peer.net.std

    @torch.inference_mode()
    def __call__(self, paths: list[Path], out: Path) -> np.ndarray:
        rows = []
        for images in DataLoader(
            Photos(paths, DECODE_SIZE, self.input_size), batch_size=BATCH_SIZE, num_workers=self.loaders
        ):
            pixels = images.to(memory_format=torch.channels_last).float().sub_(self.mean).div_(self.std)
            rows.append(torch.nn.functional.normalize(self.head(self.net(pixels))).numpy())
        embeddings = np.concatenate(rows)
        column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
        pq.write_table(pa.table({"path": [str(path) for path in paths], "embedding": column}), out / "all.parquet")
        return embeddings


def main(which: str, run: str, folder: str) -> None:
    with ExitStack() as stack:
        if which == "ray":
            from ray_dmml.ray_backend.session import ray_session

            stack.enter_context(ray_session())
        if which.startswith("plain"):
            plain = PlainLoop(run, loaders=max(1, num_cores() - 1) if which == "plain-loaders" else 0)

        def work(_: int) -> dict[str, Any]:
            paths = sorted(Path(folder).iterdir())
            with TemporaryDirectory(prefix="benchmark-") as name:
                out = Path(name)
                began = time.perf_counter()
                if which.startswith("plain"):
                    some = plain(paths, out)[:8]
                else:
                    embed(run, folder, out, local=which == "local", batch_size=BATCH_SIZE)
                seconds = time.perf_counter() - began
                if not which.startswith("plain"):
                    column = pq.read_table(out / "part-00000.parquet")["embedding"]
                    some = np.asarray(column.to_pylist()[:8])
            return {"images_per_s": len(paths) / seconds, "some": some.tolist()}

        serve(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
