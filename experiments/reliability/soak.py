"""Trains a tiny cohort for long and watches what its processes hold.

    python experiments/reliability/soak.py --steps 20000

Resident memory and open files of every process of the run, sampled over time: a leak shows as a slope
after the first quarter. At the end nothing of ours may be left in Ray's object store.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import typer
from chaos import make_images, processes_of, settings
from rich.console import Console
from rich.table import Table

from ray_dmml.config.schema import Config
from ray_dmml.training.run import train

MIB = 2**20


def sample() -> dict[int, tuple[str, float, int]]:
    """Of every process of this session: number -> (title, resident MiB, open files)."""
    found = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for pid in processes_of(os.getsid(0)):
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            title = command.split(" ")[0].rsplit("/", 1)[-1]
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            num_files = len(os.listdir(f"/proc/{pid}/fd"))
            # Ray's titles end with what the actor does at the moment.
            found[pid] = (title.split(".")[0], pages * page / MIB, num_files)
    return found


def slope(times: np.ndarray, values: np.ndarray) -> float:
    """A second, by least squares after the first quarter."""
    late = times > times[0] + 0.25 * (times[-1] - times[0])
    return float(np.polyfit(times[late], values[late], 1)[0])


def held_bytes() -> float:
    """In Ray's object store."""
    total = ray.cluster_resources().get("object_store_memory", 0.0)
    return total - ray.available_resources().get("object_store_memory", 0.0)


def main(
    steps: Annotated[int, typer.Option(min=100, help="Steps.")] = 20_000,
    every_s: Annotated[float, typer.Option(help="Seconds between two samples.")] = 5.0,
    transport: Annotated[str, typer.Option(help="direct or coordinator.")] = "direct",
) -> None:
    """Memory and open files over a long run."""
    os.setsid() if os.getsid(0) != os.getpid() else None
    console = Console()
    samples: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
    titles: dict[int, str] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            for pid, (title, resident, files) in sample().items():
                titles[pid] = title
                samples[pid].append((time.monotonic(), resident, files))

    with tempfile.TemporaryDirectory(prefix="ray-dmml-soak-") as folder:
        make_images(Path(folder) / "images")
        raw: dict[str, Any] = settings(Path(folder) / "images", transport, "three")
        raw["train"] |= {"steps": steps, "evaluate_every": max(1, steps // 20), "log_every": 50, "report": False}
        raw["checkpoint"] = {"every_steps": max(1, steps // 40)}
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        began = time.monotonic()
        train(Config.parse(raw), Path(folder) / "run", progress=False)
        seconds = time.monotonic() - began
        ended.set()
        watcher.join()
        held = held_bytes()
        for _ in range(10):  # what actors that just ended have held is given back a moment later
            if held:
                time.sleep(1)
                held = held_bytes()
        ray.shutdown()

    table = Table(box=None)
    for column in (
        "process",
        "MiB at first",
        "at last",
        "MiB an hour",
        "files at first",
        "at last",
    ):
        table.add_column(column, justify="left" if column == "process" else "right")
    for pid, rows in sorted(samples.items()):
        times, resident, files = (np.array(column) for column in zip(*rows, strict=True))
        if len(rows) < 8:
            continue  # it lived for a moment only
        quarter = len(rows) // 4
        table.add_row(
            titles[pid],
            f"{resident[quarter]:.1f}",
            f"{resident[-1]:.1f}",
            f"{3600 * slope(times, resident):+.2f}",
            str(files[quarter]),
            str(files[-1]),
        )
    console.print(table)
    console.print(f"{steps} steps in {seconds:.0f} s; held in the object store at the end: {held:.0f} bytes")


if __name__ == "__main__":
    typer.run(main)
