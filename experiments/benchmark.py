"""How fast ray-dmml is, compared with what a competent user would write instead.

    python experiments/benchmark.py [--only NAME]... [--rounds N] [--json FILE]

A and B are measured in turn, in one run, on the same cores with the same number of threads. The figures
are medians over the rounds. The competitors are the programs in experiments/benchmarks/plain.py.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from benchmarks.row import Row, Settings
from provenance import commit
from rich import box
from rich.console import Console
from rich.table import Table

EXPERIMENTS = Path(__file__).parent
WIDTH = 200

# Module and function of each row. They are imported when they run, so that rows without Ray load none.
ROWS = {
    "exchange": ("exchange", "exchange"),
    "exchange-coordinator": ("exchange", "exchange_coordinator"),
    "step-ideal": ("steps", "step_ideal"),
    "step-plain": ("steps", "step_plain"),
    "step-sequential": ("steps", "step_sequential"),
    "step-views": ("views", "step_views"),
    "gpu-views": ("views", "gpu_views"),
    "gpu-plain": ("views", "gpu_plain"),
    "relational": ("relational", "relational"),
    "relational-memory": ("relational", "relational_memory"),
    "ensemble-teacher": ("relational", "ensemble_teacher"),
    "recall": ("recall", "recall"),
    "recall-million": ("recall", "recall_million"),
    "recall-pml": ("recall", "recall_pml"),
    "evaluate": ("evaluation", "evaluate"),
    "embed": ("embed", "embed_on_ray"),
    "embed-local": ("embed", "embed_local"),
    "index": ("index", "index"),
    "index-flat": ("index", "index_flat"),
    "serve": ("serve", "serve"),
    "report": ("report", "report"),
    "input": ("images", "input_row"),
    "input-cached": ("images", "input_cached"),
    "start": ("start", "start"),
    "trial-start": ("start", "trial_start"),
    "import-time": ("start", "import_time"),
    "memory": ("steps", "memory"),
    "micro-batch": ("micro_batch", "micro_batch"),
    "checkpoint": ("checkpoints", "checkpoint"),
    "scaling": ("scaling", "scaling"),
    "published": ("published", "published"),
    "export": ("exported", "export"),
}
TABLES = ("scaling", "published", "export")
"""These have no goal, and a table of their own."""

PACKAGES = ("torch", "torchvision", "ray", "numpy", "faiss-cpu", "pytorch-metric-learning", "timm")


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    from ray_dmml.training.provenance import cpu  # found by now, wherever this is started

    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "cpu": cpu(),
        "cores_used": len(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def shown(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def goals_table(rows: list[Row]) -> Table:
    header = ("name", "what (A / B)", "A", "B", "unit", "ratio", "spread", "goal", "met")
    table = Table(*header, box=box.MARKDOWN)
    for row in rows:
        ratio = shown(median(row.ratios)) if row.b else ""
        spread = " - ".join(shown(value) for value in row.spread or ())
        b = shown(median(row.b)) if row.b else ""
        met = "yes" if row.met else "NO"
        a = shown(median(row.a))
        table.add_row(row.name, row.what, a, b, row.unit, ratio, spread, str(row.goal), met)
    return table


def plain_table(lines: list[dict[str, Any]]) -> Table:
    table = Table(*lines[0], box=box.MARKDOWN)
    for line in lines:
        cells = (value if isinstance(value, str) else shown(value) for value in line.values())
        table.add_row(*cells)
    return table


def main(
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A row to run. Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often A and B are measured.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to train on, one folder a class (16 or more)."),
    ] = None,
    cores: Annotated[int, typer.Option(min=1, help="Cores that everything runs on.")] = 2,
) -> None:
    """Measure ray-dmml against its competitors."""
    names = only or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise typer.BadParameter(f"no row {', '.join(unknown)}; the rows are {', '.join(ROWS)}")
    # Before torch or Ray is loaded, which count the cores. Child processes inherit the setting.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    # The benchmark's images do not belong in the user's cache.
    cache = TemporaryDirectory(prefix="benchmark-cache-")
    os.environ["XDG_CACHE_HOME"] = cache.name
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(EXPERIMENTS), str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")]
    )
    sys.path.append(str(EXPERIMENTS.parent))
    report: dict[str, Any] = {
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "rounds": rounds,
    }
    console = Console(width=WIDTH)
    rows: list[Row] = []
    settings = Settings(rounds, data_root)
    for name in names:
        module, function = ROWS[name]
        began = time.perf_counter()
        result = getattr(importlib.import_module(f"benchmarks.{module}"), function)(settings)
        seconds = time.perf_counter() - began
        Console(stderr=True).print(f"{name}: measured in {seconds:.0f} s", highlight=False)
        if name in TABLES:
            report[name] = result
        else:
            rows += result
        if json_file is not None:  # after every row, because a later one may fail
            report["rows"] = [row.as_json() for row in rows]
            json_file.write_text(json.dumps(report, indent=1))
    if rows:
        console.print(goals_table(rows))
    for name in TABLES:
        if report.get(name):
            console.print(plain_table(report[name]))
    model = report["machine"]["cpu"]
    console.print(f"{report['commit']}, {model}, {cores} cores, {rounds} rounds", highlight=False)


if __name__ == "__main__":
    typer.run(main)
