"""Rows `start`, `trial-start` and `import-time`: how long a run, a trial of a search and a command take to start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.row import Goal, Row, Settings, in_turn

POLL_S, LIMIT_S = 0.01, 120.0
IMPORTS_AND_RAY = """
import os, logging
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import torch, ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
print("up", flush=True)
"""


def first_step() -> float:
    """Seconds from the start of the command until metrics.jsonl has its first step."""
    with TemporaryDirectory(prefix="benchmark-") as name:
        metrics = Path(name) / "run" / "metrics.jsonl"
        settings = ["evaluation.untrained=false", "train.log_every=1"]
        command = [sys.executable, "-m", "ray_dmml.cli", "train", "--out", str(metrics.parent)]
        for setting in settings:
            command += ["--set", setting]
        began = time.perf_counter()
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if run.poll() is not None or time.perf_counter() - began > LIMIT_S:
                    raise RuntimeError(f"{' '.join(command)}: no step within {LIMIT_S:g} s")
                time.sleep(POLL_S)
            return time.perf_counter() - began
        finally:
            run.send_signal(signal.SIGINT)
            run.wait(60)


def imports_and_ray() -> float:
    """Seconds to import torch and ray and to start Ray, which every run has to do."""
    began = time.perf_counter()
    command = [sys.executable, "-c", IMPORTS_AND_RAY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return time.perf_counter() - began


def start(settings: Settings) -> list[Row]:
    a, b = in_turn(settings.rounds, first_step, imports_and_ray)
    what = "command to first finished step, default run / importing torch and ray, ray.init"
    return [Row("start", what, "s", a, b, Goal("A", "<=", 15))]


def trial_start(settings: Settings) -> list[Row]:
    """What a trial takes beside its work (its step, evaluations and checkpoints), from the end of the trial before on:
    the quickstart's peers, one trial at a time. The first trial is left out: it starts the processes."""
    from ray_dmml.config.loading import QUICKSTART, read_settings
    from ray_dmml.tune.results import SearchDir
    from ray_dmml.tune.search_space import Search, SearchConfig
    from ray_dmml.tune.tuner import run_search

    raw = read_settings(QUICKSTART, ["train.steps=1", "evaluation.untrained=false", "train.report=false"])
    config = {
        "space": {"loss.relational.angle_weight": {"uniform": [0, 4]}},
        **{"num_samples": settings.rounds + 2, "sampler": "random", "scheduler": "none", "final_seeds": 0},
    }
    with TemporaryDirectory(prefix="benchmark-") as name:
        run_search(Path(name) / "search", Search(raw, SearchConfig.model_validate(config)))
        files = SearchDir(Path(name) / "search")
        trials = sorted(files.trials(), key=lambda trial: trial.start_time)
        work = []
        for trial in trials:
            results = json.loads((files.trial_folder(trial.name) / "fold0-seed0" / "results.json").read_text())
            work.append(sum(of for phase, of in results["seconds"]["run"].items() if phase != "start of the peers"))
    ends = [trial.start_time + trial.seconds for trial in trials]
    seconds = [later - earlier - of for (earlier, later), of in zip(pairwise(ends), work[1:], strict=True)]
    what = "what a trial takes beside its step, evaluations and checkpoints, after another one"
    return [Row("trial-start", what, "s", seconds, [], Goal("A", "<=", 4))]


def seconds_of(*arguments: str) -> float:
    """Seconds of a process of Python, from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def import_time(settings: Settings) -> list[Row]:
    """What a user waits for before anything happens. B is a program that imports the libraries of the command line."""
    rows = []
    for what, arguments, limit in (
        ("import ray_dmml", ("-c", "import ray_dmml"), 0.3),
        ("ray-dmml --help", ("-m", "ray_dmml.cli", "--help"), 0.6),
        ("ray-dmml train --help", ("-m", "ray_dmml.cli", "train", "--help"), 0.6),
    ):
        seconds_of(*arguments)  # the files are read from the disk once
        a, b = in_turn(
            settings.rounds,
            lambda arguments=arguments: seconds_of(*arguments),
            lambda: seconds_of("-c", "import typer, rich"),
        )
        rows.append(Row("import-time", f"{what} / importing typer and rich", "s", a, b, Goal("A", "<=", limit)))
    return rows
