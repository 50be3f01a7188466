"""Interrupts runs at random moments, from the start of the command to its end, on Ray and in one process.

    python experiments/reliability/interrupts.py --tries 200

A try starts `ray-dmml train` with tiny networks and sends it one signal: SIGINT as a terminal does, to all processes of
the group, or SIGTERM to the command alone. The run must end within seconds, with the signal's exit code, without a
traceback and without a process left, and its folder must be missing or one that `--resume` continues. Seven of eight
moments are in the first 15 seconds, the others between the first checkpoint and the end. The exit code is 1 if a try
fails.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))
from chaos import make_images
from provenance import commit

HANGS_S = 60.0
PHASES = ("imports and start", "before the first step", "steps", "after the last step", "over")


def settings(root: Path) -> dict[str, Any]:
    """Two peers that train for a few seconds, with evaluations and checkpoints in between."""
    return {
        "data": {"name": "imagefolder", "root": str(root), "decode_size": 36, "classes_per_batch": 4}
        | {"images_per_class": 3, "validation_fraction": 0.25},
        "cohort": {
            "threads_per_peer": 1,
            "base": {"backbone": "test_resnet", "input_size": 32, "embedding_size": 16, "batch_norm": "train"},
            "peers": [{}, {"view": "weak"}],
        },
        "train": {"steps": 60, "evaluate_every": 25, "log_every": 5},
        "checkpoint": {"every_steps": 10},
        "evaluation": {"recall_at": [1]},
    }


def command(folder: Path, mode: str) -> subprocess.Popen[str]:
    """The run, in a session of its own, so that the processes that it leaves are known."""
    options = ["--config", "config.yaml", "--out", str(folder), *(["--local"] if mode == "local" else [])]
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ray_dmml.cli", "train", *options],
            cwd=folder.parent,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
            # A shell's background job ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def processes_of(session: int) -> list[str]:
    """Command lines of the living processes of a session."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and os.getsid(int(entry.name)) == session:
                    lines.append((entry / "cmdline").read_bytes().decode().replace("\0", " ")[:80])
            except OSError:
                continue
    return lines


def phase_of(folder: Path) -> str:
    """How far a run is, by its files."""
    if (folder / "results.json").exists():
        return "over"
    if not (folder / "checkpoints" / "index.json").exists():
        return "imports and start"
    rows = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    if '"peers"' not in rows:
        return "before the first step"
    last = json.loads((folder / "checkpoints" / "index.json").read_text()).get("last", "")
    return "after the last step" if last == "step-00000060" else "steps"


def is_whole(folder: Path) -> bool:
    """Whether the folder is missing or has a run that can be resumed."""
    return not folder.exists() or ((folder / "config.yaml").exists() and (folder / "checkpoints/index.json").exists())


def attempt(folder: Path, mode: str, number: signal.Signals, moment: float, limit: float) -> dict[str, Any]:
    process = command(folder, mode)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    phase, is_over = phase_of(folder), process.poll() is not None
    began = time.monotonic()
    if not is_over:
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(HANGS_S)
    seconds, code = time.monotonic() - began, process.poll()
    deadline = time.monotonic() + 2  # the system takes a moment to end what was killed
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for _ in left:  # a failed try must not disturb the next one
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
    process.wait()
    output = folder.with_suffix(".log").read_text()
    # Python itself ends by the signal before it runs the command, and after the command has ended.
    is_pythons = (phase == "imports and start" and "ray_dmml" not in output and "interrupted" not in output) or (
        phase == "over"
    )
    expected = (128 + number, -number, 1) if is_pythons else (128 + number,)
    faults = []
    if code is None:
        faults.append("hung")
    elif not is_over and code not in expected and not (code == 0 and phase == "over"):
        faults.append(f"exit code {code}")
    if seconds > limit:
        faults.append(f"took {seconds:.1f} s")
    if not is_pythons and ("Traceback" in output or "Error" in output):
        faults.append("traceback")
    if left:
        faults.append("left: " + "; ".join(left))
    if not is_whole(folder):
        faults.append("half a run: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    row = {"mode": mode, "signal": number.name, "moment": round(moment, 3), "phase": phase, "is_over": is_over}
    row |= {"seconds": round(seconds, 2), "code": code, "lines": output.count("\n"), "faults": faults}
    if faults:
        row["output"] = output[-2000:]
    return row


def undisturbed(folder: Path, mode: str) -> tuple[float, float]:
    """Seconds to the first checkpoint and to the end of a run that nothing happens to."""
    began, start = time.monotonic(), 0.0
    process = command(folder, mode)
    while process.poll() is None:
        if not start and phase_of(folder) != "imports and start":
            start = time.monotonic() - began
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed: {folder.with_suffix('.log').read_text()}")
    return start, time.monotonic() - began


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("mode", "phase", "tries", "median s", "longest s", "faults")
    for mode in ("ray", "local"):
        for phase in PHASES:
            some = [row for row in rows if row["mode"] == mode and row["phase"] == phase and not row["is_over"]]
            if some:
                seconds = sorted(row["seconds"] for row in some)
                faults = sum(bool(row["faults"]) for row in some)
                cells = (len(some), f"{seconds[len(seconds) // 2]:.1f}", f"{seconds[-1]:.1f}", faults)
                table.add_row(mode, phase, *map(str, cells))
    console.print(table)


def main(
    tries: Annotated[int, typer.Option(help="Number of runs.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
    limit: Annotated[float, typer.Option(help="Seconds within which a run must end.")] = 3.0,
    rows: Annotated[Path | None, typer.Option(help="File to append a JSON line for each try to.")] = None,
) -> None:
    console, chance = Console(), random.Random(seed)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="interrupts-") as name:
        work = Path(name)
        os.environ |= {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
        make_images(work / "images")
        (work / "config.yaml").write_text(json.dumps(settings(work / "images")))
        lengths = {mode: undisturbed(work / f"undisturbed-{mode}", mode) for mode in ("ray", "local")}
        console.print(f"undisturbed (first checkpoint, end): {lengths}")
        for place in range(tries):
            mode = ("ray", "local")[place % 2]
            start, end = lengths[mode]
            moment = chance.uniform(start, end) if place // 2 % 8 == 7 else chance.uniform(0, 15)
            number = chance.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
            row = {"try": place, "commit": commit(), **attempt(work / f"run-{place}", mode, number, moment, limit)}
            found.append(row)
            if rows is not None:
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if row["faults"]:
                console.print_json(json.dumps(row))
    show(found, console)
    if any(row["faults"] for row in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
