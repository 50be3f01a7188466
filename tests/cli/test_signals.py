"""Ctrl-C and SIGTERM from outside: a checkpoint, the command that resumes the run, and no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import tiny

from ray_dmml.config import yamlio
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir

pytestmark = pytest.mark.ray


PATIENCE_S = 120.0


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(image_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a long run in a session of its own, so that the processes that it leaves are known:
    ``start(*options, num_peers=2)``."""
    started: list[subprocess.Popen[str]] = []

    def start_run(*options: str, num_peers: int = 2) -> subprocess.Popen[str]:
        config = tmp_path / "config.yaml"
        raw = tiny(
            image_folder,
            train={"steps": 100_000, "evaluate_every": 0, "log_every": 2, "tensorboard": False},
            checkpoint={"every_steps": 0},
            evaluation={"recall_at": [1], "untrained": False},
        )
        raw["cohort"]["peers"] = raw["cohort"]["peers"][:num_peers]
        config.write_text(yamlio.dump(raw))
        command = [sys.executable, "-m", "ray_dmml.cli", "train", "--config", str(config)]
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "my run"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_run
    for process in started:  # those of a failed test
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for_steps(run: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < until, "no step was made"
        time.sleep(0.1)


def processes_of(session: int) -> list[str]:
    """Command lines of the living processes of a session."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                    if state != "Z":
                        lines.append((entry / "cmdline").read_bytes().decode())
            except (OSError, ProcessLookupError):
                continue
    return lines


def assert_nothing_left(session: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while processes_of(session):
        assert time.monotonic() < until, processes_of(session)
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGINT, ["--local"]), (signal.SIGTERM, [])],
    ids=["SIGINT in process", "SIGTERM on Ray"],
)
def test_once_stops_after_the_step(start: Start, tmp_path: Path, number: signal.Signals, options: list[str]) -> None:
    """It ends with the signal's exit code, a checkpoint of its step, and the command that resumes it.
    Weights and metrics are those of a run of as many steps."""
    process = start(*options)
    run = tmp_path / "my run"
    wait_for_steps(run)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number, output
    assert "stopping after this step" in output
    assert f"resume with: ray-dmml train --resume '{run}'" in output
    folder = RunDir.open(run)
    last = folder.checkpoints.load("last")
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert last.step == lines[-1]["step"] == len(lines) > 0
    assert_nothing_left(process.pid)

    config = folder.config()
    short = config.model_copy(update={"train": config.train.model_copy(update={"steps": last.step})})
    train(short, tmp_path / "undisturbed", local=True)
    assert RunDir(tmp_path / "undisturbed").checkpoints.load("last").peers == last.peers


@pytest.mark.parametrize(
    ("number", "seconds", "options"),
    [
        (signal.SIGINT, 0.3, ["--local"]),
        (signal.SIGINT, 1.0, []),
        (signal.SIGTERM, 2.5, []),
        pytest.param(signal.SIGINT, 1.7, [], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 4.0, [], marks=pytest.mark.slow),
    ],
)
def test_before_the_first_step_it_ends_at_once(
    start: Start, tmp_path: Path, number: signal.Signals, seconds: float, options: list[str]
) -> None:
    """Amid imports, while Ray starts, while peers start: the exit code, one line at most besides what takes the time,
    no process, no run."""
    process = start(*options)
    time.sleep(seconds)
    os.killpg(process.pid, number)  # a terminal sends it to all
    output, _ = process.communicate(timeout=PATIENCE_S)
    said = [line for line in output.splitlines() if not line.endswith(" ...")]
    assert process.returncode == 128 + number and said in ([], ["interrupted"]), output
    assert not (tmp_path / "my run").exists()
    assert_nothing_left(process.pid)


def test_twice_stops_now(start: Start, tmp_path: Path) -> None:
    """The second one does not wait for a step that never ends, such as that of a stopped peer."""
    process = start(num_peers=1)
    wait_for_steps(tmp_path / "my run")
    [peer] = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and (entry / "cmdline").exists()
        and b"PeerActor" in (entry / "cmdline").read_bytes()
        and os.getsid(int(entry.name)) == process.pid
    ]
    os.kill(peer, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "--resume" in output
    assert_nothing_left(process.pid)


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process(start: Start, tmp_path: Path) -> None:
    """SIGKILL gives it no time to clean up. Peers and Ray end without it."""
    process = start()
    wait_for_steps(tmp_path / "my run")
    process.kill()
    process.communicate()
    assert_nothing_left(process.pid)
