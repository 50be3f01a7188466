"""Embeds 100,000 images with `ray-dmml embed`, and kills it and its processes at random moments.

    python experiments/reliability/many_images.py --images 100000 --kills 6

It makes tiny images, some of them damaged, and a run of two tiny peers. Kills alternate: one of an actor, which must go
unnoticed, and one of the command, which is then started again. At the end every image must have one row, equal to
that of an undisturbed `--local` call. The largest memory of the command and of an actor is printed, in the first tenth
and in all; they should be alike. The exit code is 1 if a row is missing, there twice, or differs.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from PIL import Image
from processes import below
from rich.console import Console

sys.path.append(str(Path(__file__).parents[2]))
from ray_dmml import Config, embed, train
from ray_dmml.embedding.embed import BATCH_SIZE
from ray_dmml.embedding.output import shard_size

SIDE, NUM_FOLDERS, DAMAGED_EVERY = 24, 100, 5000


def make_images(folder: Path, num_images: int) -> None:
    """PNG files in 100 folders; one in 5,000 is damaged."""
    rng = np.random.default_rng(0)
    for number in range(NUM_FOLDERS):
        (folder / f"{number:02d}").mkdir(parents=True)
    for number in range(num_images):
        path = folder / f"{number % NUM_FOLDERS:02d}" / f"{number:07d}.png"
        if number % DAMAGED_EVERY:
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path, compress_level=0)
        else:
            path.write_bytes(b"damaged")


def make_run(folder: Path) -> None:
    """Two tiny peers, trained for one step."""
    rng = np.random.default_rng(1)
    for number in range(16):
        path = folder / "classes" / f"{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    raw: dict[str, Any] = {
        "data": {"name": "imagefolder", "root": str(folder / "classes"), "decode_size": 36, "validation_fraction": 0}
        | {"classes_per_batch": 2, "images_per_class": 2},
        "cohort": {
            "base": {"backbone": "test_resnet", "input_size": 32, "embedding_size": 16},
            "peers": [{}, {"view": "weak"}],
        },
        "train": {"steps": 1, "evaluate_every": 0, "report": False},
    }
    train(Config.parse(raw), folder / "run", local=True, progress=False)


@dataclass
class Memory:
    """The largest resident memory seen, in MiB, of the command and of an actor."""

    command: int = 0
    actor: int = 0

    def see(self, pid: int, actors: list[int]) -> None:
        self.command = max(self.command, _resident_mib(pid))
        self.actor = max(self.actor, *map(_resident_mib, actors), 0)


@dataclass
class Watch:
    """Memory in the first tenth of the images, and in all."""

    early: Memory = field(default_factory=Memory)
    whole: Memory = field(default_factory=Memory)


def _resident_mib(pid: int) -> int:
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024
    return 0


def rows_of(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("part-*.parquet"))])


def main(
    images: Annotated[int, typer.Option(min=1000, help="Number of images.")] = 100_000,
    kills: Annotated[int, typer.Option(min=0, help="Number of kills.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Embed many images, with kills in between."""
    console, draw = Console(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="many-images-") as name:
        folder = Path(name)
        make_images(folder / "images", images)
        make_run(folder)
        out, watch = folder / "out", Watch()
        num_shards = math.ceil(images / shard_size(images, BATCH_SIZE))
        moments = sorted(draw.uniform(0.02, 0.95) for _ in range(kills))
        command = [sys.executable, "-m", "ray_dmml.cli", "embed", str(folder / "run"), str(folder / "images")]
        began, is_done, killed = time.monotonic(), False, {"command": 0, "actor": 0}
        while not is_done:
            with (folder / "log").open("w") as log:
                process = subprocess.Popen([*command, "--out", str(out)], stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(0.2)
                done = len(list(out.glob("part-*.parquet"))) / num_shards
                actors = below(process.pid, b"MapWorker")
                watch.whole.see(process.pid, actors)
                if done < 0.1:
                    watch.early.see(process.pid, actors)
                if moments and done >= moments[0] and (actors or len(moments) % 2):
                    what = "command" if len(moments) % 2 else "actor"
                    os.kill(process.pid if what == "command" else draw.choice(actors), signal.SIGKILL)
                    killed[what] += 1
                    console.print(f"{done:.0%} done: killed {what}", highlight=False)
                    moments.pop(0)
                    if what == "command":
                        process.wait()
            is_done = process.returncode == 0
            if not is_done and process.returncode != -signal.SIGKILL:
                console.print((folder / "log").read_text(), markup=False)
                raise typer.Exit(1)
        console.print(f"{images} images in {time.monotonic() - began:.0f} s, killed {killed}", highlight=False)
        early, whole = watch.early, watch.whole
        console.print(f"memory of the command: {early.command} MiB in the first tenth, {whole.command} in all")
        console.print(f"memory of an actor: {early.actor} MiB in the first tenth, {whole.actor} in all")
        rows = rows_of(out)
        embed(folder / "run", folder / "images", folder / "undisturbed", local=True)
        paths = rows["path"].to_pylist()
        unreadable = rows.num_rows - rows["error"].null_count
        console.print(f"rows {len(paths)}, different paths {len(set(paths))}, unreadable {unreadable}")
        expected = -(-images // DAMAGED_EVERY)
        is_right = rows.equals(rows_of(folder / "undisturbed")) and len(paths) == len(set(paths)) == images
        console.print("all rows are right" if is_right and unreadable == expected else "ROWS ARE WRONG")
        raise typer.Exit(0 if is_right and unreadable == expected else 1)


if __name__ == "__main__":
    typer.run(main)
