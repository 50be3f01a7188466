"""All that needs a GPU, in less than eight minutes on 16 cores: rows of the benchmark, tests, a profile of some steps.

    python experiments/gpu.py --out FOLDER [--tiny]

Each part is written to the folder when it is finished. `--tiny` tries the script on a CPU with a small net; its
figures mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

EXPERIMENTS = Path(__file__).parent
sys.path.append(str(EXPERIMENTS.parent))

PROFILED_STEPS = 5


def profile(*, tiny: bool) -> str:
    """Where the time of some steps goes, as a table of torch's profiler."""
    import torch
    from benchmarks.views import photo_folder, published_settings, timed_peer

    from ray_dmml.config.schema import Config

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    activities = [torch.profiler.ProfilerActivity.CPU]
    sort = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        sort = "self_cuda_time_total"
    with photo_folder(tiny=tiny) as folder:
        raw = published_settings(folder, tiny=tiny)
        raw["cohort"]["peers"] = [{"view": "standard"}]
        with timed_peer(Config.parse(raw), 1 if tiny else 15, device) as timed:
            timed.step_ms()
            with torch.profiler.profile(activities=activities) as profiler:
                timed.run(PROFILED_STEPS)
    averages = profiler.key_averages()
    reads = sum(row.count for row in averages if row.key == "aten::_local_scalar_dense")
    heading = f"{PROFILED_STEPS} steps, {reads} reads of a value from the device\n"
    return heading + averages.table(sort_by=sort, row_limit=25)


def rows(name: str, rounds: int, *, tiny: bool) -> list[dict[str, Any]]:
    from benchmarks import views
    from benchmarks.row import Settings

    function: Callable[..., Any] = {"gpu-views": views.gpu_views, "gpu-plain": views.gpu_plain}[name]
    return [row.as_json() for row in function(Settings(rounds), tiny=tiny)]


def options(rounds: int) -> list[dict[str, Any]]:
    from benchmarks.published import published
    from benchmarks.row import Settings

    return published(Settings(rounds))


def main(
    out: Annotated[Path, typer.Option(help="Folder of the figures.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often A and B are measured.")] = 3,
    tiny: Annotated[bool, typer.Option(help="Try the script on a CPU.")] = False,
) -> None:
    """Measure, test and profile on a GPU."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(EXPERIMENTS), str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")]
    )
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    def part(name: str, make: Callable[[], Any]) -> None:
        began = time.perf_counter()
        try:
            made = make()
            text = made if isinstance(made, str) else json.dumps(made, indent=1)
        except Exception as error:  # the other parts are worth having
            text = f"failed: {error!r}"
        (out / f"{name}.{'txt' if name in ('tests', 'profile') else 'json'}").write_text(text)
        console.print(f"{name}: {time.perf_counter() - began:.0f} s", highlight=False)

    part("gpu-views", lambda: rows("gpu-views", rounds, tiny=tiny))
    part("gpu-plain", lambda: rows("gpu-plain", rounds, tiny=tiny))
    part("profile", lambda: profile(tiny=tiny))
    part("published", lambda: options(rounds))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    part("tests", lambda: subprocess.run(command, cwd=EXPERIMENTS.parent, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    typer.run(main)
