"""Kills, stops and damages everything that can fail, at random, and compares the end of the run.

    python experiments/reliability/chaos.py --runs 60

Each run trains peers that differ on Ray. Its seed determines which faults strike it and when: during a step,
while a checkpoint is written, during an evaluation, or during the recovery from an earlier fault. Seeds from 60 on
begin with a fault between two files of a checkpoint. A row records the
faults, and whether weights, optimizers and metrics equal those of the undisturbed run to the bit. If lost peers are
dropped, the run must equal one in which they leave at that step.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1]))
from provenance import commit

STEPS = 60
SILENCE_S = 5.0
HANGS_S = 300.0
"""A run that takes longer hangs."""

FAULTS = (
    "kill peer",
    "stop peer",
    "kill coordinator",
    "stop coordinator",
    "kill node",
    "kill driver",
    "cut checkpoint",
    "full disk",
    "damage embedding",
    "pause driver",
)

LATER_FAULTS = ("kill peer in checkpoint", "kill driver in checkpoint", "kill view worker")
"""A peer dies when it has written its files and they are not synced yet; the driver dies when one peer has written its
files and another has not; a process that makes a peer's views dies."""

NUM_FIRST_SEEDS = 60
"""Seeds from this on begin with one of these. What the seeds below draw must not change: runs are named by them."""

DROPPING = ("kill peer", "stop peer", "kill peer in checkpoint", "kill view worker")
"""Faults of the variant `drop`, which says what a run ends with if nothing but peers is lost."""

VARIANTS = ("three", "five", "two teachers", "odd", "drop")
"""Three peers; five; five that learn from two others each; three whose batch and embeddings have odd
sizes, with TensorBoard events; four where a lost peer is dropped."""


MOMENTS = {
    "saving a checkpoint": "save",
    "evaluating on the validation images": "evaluation",
    "recovering lost peers": "recovery",
}
"""What the package's debug log says when a moment begins."""

LONGEST_DELAY_S = {"save": 1.5, "evaluation": 1.5, "recovery": 6.0}
"""Seconds from the beginning of a moment to its fault."""


def settings(root: Path, transport: str, variant: str, num_workers: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = {
        "data": {
            "name": "imagefolder",
            "root": str(root),
            "decode_size": 36,
            "classes_per_batch": 4,
            "images_per_class": 3,
            "validation_fraction": 0.25,
        },
        "cohort": {
            "threads_per_peer": 1,
            "transport": transport,
            "start_timeout_s": 120,
            "base": {
                **{"input_size": 32, "embedding_size": 16, "batch_norm": "train", "num_cpus": 1},
                "num_workers": num_workers,
            },
            "peers": [
                {"backbone": "test_resnet", "ema": {"decay": 0.9}},
                {"backbone": "test_efficientnet", "embedding_size": 24, "update_interval": 2},
                {"backbone": "test_resnet", "view": "strong", "optimizer": {"name": "adamw"}},
            ],
        },
        "train": {"steps": STEPS, "evaluate_every": 20, "log_every": 5, "tensorboard": False, "report": False},
        "evaluation": {"recall_at": [1], "untrained": False},
        "checkpoint": {"every_steps": 10},
        "failure": {"heartbeat_timeout_s": SILENCE_S, "max_failures": 30, "node_timeout_s": 10},
    }
    cohort = found["cohort"]
    if variant in ("five", "two teachers", "drop"):
        cohort["base"]["num_cpus"] = 0.5
        cohort["peers"] += [{"backbone": "test_resnet", "view": "weak"}]
    if variant in ("five", "two teachers"):
        cohort["peers"] += [{"backbone": "test_resnet", "update_interval": 3}]
    if variant == "two teachers":
        cohort["max_teachers"] = 2
    elif variant == "odd":
        found["data"]["classes_per_batch"] = 3
        cohort["base"]["embedding_size"], cohort["peers"][1]["embedding_size"] = 15, 23
        found["train"]["tensorboard"] = True
    elif variant == "drop":
        found["failure"] |= {"on_peer_loss": "drop", "max_failures": 0}
    return found


def make_images(root: Path) -> None:
    """16 classes of noise with a mark, so that there is something to learn."""
    generator = np.random.default_rng(0)
    for label in range(16):
        (root / f"class{label:02d}").mkdir(parents=True)
        for image in range(5):
            pixels = generator.integers(0, 120, (24, 24, 3), dtype=np.uint8)
            pixels[4 * (label % 4) : 4 * (label % 4) + 8, 4 * (label // 4) :][:, :8] += 100
            Image.fromarray(pixels).save(root / f"class{label:02d}" / f"{image}.png")


# --- inside the driver, a process of its own ----------------------------------------------------


class Striker:
    """Causes each fault at its moment: at a step, or some time after a checkpoint, an evaluation or a recovery
    has begun."""

    def __init__(self, folder: Path, faults: list[dict[str, Any]]) -> None:
        self._folder, self._faults = folder, faults
        self.cohort: Any = None
        self.cluster_nodes: list[Any] = []
        self._ballast: Path | None = None

    def _is_new(self, fault: dict[str, Any]) -> bool:
        """A fault strikes once, also if the driver is started again."""
        mark = self._folder / f"struck-{fault['number']}"
        if mark.exists():
            return False
        mark.touch()
        return True

    def at(self, moment: str, step: int = 0) -> None:
        for fault in self._faults:
            if fault["moment"] == moment and step >= fault["step"] and self._is_new(fault):
                if moment == "step":
                    self._strike(fault)
                else:
                    threading.Timer(fault["delay"], self._strike, [fault]).start()

    def _strike(self, fault: dict[str, Any]) -> None:
        (self._folder / f"hit-{fault['number']}").write_text(f"{time.time()}")
        what, peer = fault["what"], f"peer{fault['peer']}"
        if what == "kill driver":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what in ("kill peer", "stop peer"):
            self._signal(self._pid(peer), what)
        elif what in ("kill coordinator", "stop coordinator"):
            self._signal(_coordinator_pid(), what)
        elif what == "kill node":
            # The last node with a peer that is not the head, because the session ends with the head.
            where = {place.node_id for place in self.cohort.places.values()}
            for node in [node for node in self.cluster_nodes[1:] if node.node_id in where][-1:]:
                os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        elif what == "cut checkpoint":
            self._cut_the_last_checkpoint(fault)
        elif what == "full disk":
            self._fill_the_disk()
        elif what == "kill peer in checkpoint":
            (self._folder / f"dies-{peer}").touch()
        elif what == "kill driver in checkpoint":
            (self._folder / f"kills-driver-{peer}").touch()
        elif what == "kill view worker":
            for pid in _view_workers(self._pid(peer)):
                self._signal(pid, what)
        elif what == "damage embedding":
            (self._folder / "damage").touch()
        elif what == "pause driver":
            pause = f"kill -STOP {os.getpid()}; sleep {SILENCE_S + 3}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", pause])

    def _pid(self, name: str) -> int | None:
        place = self.cohort.places.get(name)
        return place.pid if place else None

    @staticmethod
    def _signal(pid: int | None, what: str) -> None:
        if pid is None:
            return
        try:
            os.kill(pid, signal.SIGKILL if what.startswith("kill") else signal.SIGSTOP)
        except ProcessLookupError:
            return  # the fault before was faster

    def _cut_the_last_checkpoint(self, fault: dict[str, Any]) -> None:
        """Also kills a peer, so that the checkpoint is read."""
        checkpoints = self._folder / "disk" / "run" / "checkpoints"
        folders = sorted(checkpoints.glob("step-*"))
        if len(folders) > 1:
            files = sorted(path for path in folders[-1].rglob("*") if path.is_file())
            chosen = files[fault["peer"] % len(files)]
            os.truncate(chosen, chosen.stat().st_size // 2)
        self._signal(self._pid(f"peer{fault['peer']}"), "kill peer")

    def _fill_the_disk(self) -> None:
        """For three seconds."""
        ballast = self._folder / "disk" / "ballast"
        try:
            with ballast.open("wb") as file:
                while True:
                    file.write(b"\0" * 2**16)
                    file.flush()
        except OSError:
            pass
        threading.Timer(3.0, lambda: ballast.unlink(missing_ok=True)).start()


def _view_workers(peer: int | None) -> list[int]:
    """The children of the peer's server of forks."""
    listed = [] if peer is None else _children(peer)
    return [worker for child in listed for worker in _children(child)]


def _children(pid: int) -> list[int]:
    return [int(child) for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout.split()]


def _coordinator_pid() -> int | None:
    for pid in processes_of(os.getsid(0)):
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            if title.startswith(b"ray::") and b"Coordinator" in title:
                return pid
    return None


def processes_of(session: int) -> list[int]:
    """Those of a driver are all that it has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
    return found


def drive(folder: Path) -> None:
    """Trains, or goes on, in the run of a folder with the faults that its plan has."""
    import ray
    from ray.cluster_utils import Cluster

    from ray_dmml.config.schema import Config
    from ray_dmml.loggers.logger import Logger
    from ray_dmml.ray_backend.coordinator import Coordinator
    from ray_dmml.ray_backend.peer_actor import PeerActor
    from ray_dmml.ray_backend.ray_cohort import RayCohort
    from ray_dmml.training.run import train

    plan = json.loads((folder / "plan.json").read_text())
    striker = Striker(folder, plan["faults"])
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if plan["nodes"] > 1:
        checks = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 1000,
            "health_check_timeout_ms": 2000,
            "health_check_failure_threshold": 3,
        }
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": checks})
        striker.cluster_nodes = [
            cluster.head_node,
            *(cluster.add_node(num_cpus=2) for _ in range(plan["nodes"] - 1)),
        ]
        ray.init(address=cluster.address, **quiet)
    else:
        ray.init("local", num_cpus=4, include_dashboard=False, **quiet)

    flag = folder / "damage"

    class DamagingCoordinator(Coordinator):
        """Flips a bit of the next embedding once the flag is there."""

        async def exchange(self, step: int, rank: int, teachers: Any, expected: int, *parts: Any) -> list[Any]:
            if flag.exists():
                flag.unlink()
                parts = (parts[0].copy(), *parts[1:])
                parts[0].view("u1").reshape(-1)[5] ^= 4
            return await Coordinator.exchange(self, step, rank, teachers, expected, *parts)

    driver = os.getpid()

    class FaultyPeer(PeerActor):
        """Changes what it sends to another peer after the checksum was taken, and kills in checkpoints."""

        def save(self, draft: Path) -> Any:
            dies, kills = (folder / f"{what}-{draft.name}" for what in ("dies", "kills-driver"))
            if dies.exists():
                dies.unlink()
                name, kill = "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL)
                setattr(os, name, kill)
            if kills.exists():
                kills.unlink()
                others = [other for other in draft.parent.iterdir() if other != draft]
                while not any(list(other.glob("training.pt")) for other in others):
                    time.sleep(0.005)
                os.kill(driver, signal.SIGKILL)
                time.sleep(HANGS_S)
            return super().save(draft)

        def join(self, *arguments: Any) -> Any:
            place = super().join(*arguments)
            pack = getattr(self.exchange, "pack", None)
            if pack is not None:

                def damaged(*given: Any) -> Any:
                    sent = pack(*given)
                    if flag.exists():
                        flag.unlink(missing_ok=True)
                        sent.view(-1)[3] += 1
                    return sent

                self.exchange.pack = damaged  # type: ignore[attr-defined]
            return place

    class FaultyCohort(RayCohort):
        peer_class = FaultyPeer
        coordinator_class = DamagingCoordinator

        def __init__(self, *arguments: Any, **named: Any) -> None:
            striker.cohort = self
            super().__init__(*arguments, **named)

    class Steps(Logger):
        def log(self, metrics: Any, step: int) -> None:
            if not metrics:
                striker.at("step", step)

    class Sentences(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno <= logging.DEBUG:
                striker.at(MOMENTS.get(text, text))
                return
            with (folder / "notes.jsonl").open("a") as file:
                file.write(json.dumps([time.time(), text]) + "\n")

    package = logging.getLogger("ray_dmml")
    package.setLevel(logging.DEBUG)
    package.addHandler(Sentences())
    run = folder / "disk" / "run"
    if (run / "config.yaml").exists():
        train(resume=run, progress=False, loggers=[Steps()], cohort_factory=FaultyCohort)
    else:
        config = Config.parse(plan["settings"])
        train(config, run, progress=False, loggers=[Steps()], cohort_factory=FaultyCohort)
    ray.shutdown()


# --- outside ------------------------------------------------------------------------------------


def draw(seed: int) -> tuple[str, str, int, list[dict[str, Any]]]:
    """Variant, transport, nodes and faults of a run."""
    chance = random.Random(seed)
    # Every fault comes first in one of as many runs as there are faults, so that few runs have them all.
    is_old = seed < NUM_FIRST_SEEDS
    leading, number = (FAULTS, seed) if is_old else (LATER_FAULTS, seed - NUM_FIRST_SEEDS)
    first, block = number % len(leading), number // len(leading)
    variant = VARIANTS[(first + block) % len(VARIANTS)]
    transport = ("direct", "coordinator")[block % 2]
    others = FAULTS
    if variant == "drop":
        leading, others = (tuple(fault for fault in of if fault in DROPPING) for of in (leading, others))
    chosen = [leading[first % len(leading)], *chance.choices(others, k=chance.randint(0, 2))]
    nodes = 3 if "kill node" in chosen else 1
    faults = []
    for number, what in enumerate(chosen):
        later = ["step", "step", "save", "evaluation", "recovery", "recovery"]
        moment = chance.choice(later) if number else "step"
        if what == "cut checkpoint" or what in LATER_FAULTS:
            moment = "step"
        faults.append(
            {
                "number": number,
                "what": what,
                "peer": chance.randrange(3),
                "moment": moment,
                "step": chance.randint(11, STEPS - 5) if moment == "step" else 0,
                "delay": round(chance.uniform(0, LONGEST_DELAY_S.get(moment, 0)), 2),
            }
        )
    return variant, transport, nodes, faults


def outcome(run: Path) -> tuple[Any, str]:
    from ray_dmml.training.run_dir import RunDir

    folder = RunDir.open(run)
    last = folder.checkpoints.load("last")
    return (last.step, last.peers), folder.metrics_file.read_text()


def after_drops(config: Any, dropped: dict[str, int], folder: Path) -> dict[str, Any]:
    """What peers end with where some leave at a step each, trained in this process. Their files are in ``folder``."""
    from ray_dmml.cohort.local import LocalCohort
    from ray_dmml.data.datasets import load_splits

    splits, at = load_splits(config.data), 0
    state: dict[str, Any] = {}
    for stop in sorted({*dropped.values(), STEPS}):
        left = tuple(p for p in config.cohort.peers if dropped.get(p.name, STEPS) >= stop)
        part = config.model_copy(update={"cohort": config.cohort.model_copy(update={"peers": left})})
        with closing(LocalCohort(part, splits, initial_weights=not state)) as cohort:
            if state:
                cohort.load(state)
            if stop > at:
                cohort.run(at, stop, lambda finished: None)
            (folder / str(stop)).mkdir(parents=True)
            state |= cohort.save(folder / str(stop))
        at = stop
    return state


class Undisturbed:
    """What runs end with that nothing happens to."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._found: dict[str, Any] = {}

    def is_equal(self, variant: str, run: Path, faults: list[dict[str, Any]]) -> bool:
        from ray_dmml.config.schema import Config
        from ray_dmml.training.run import train
        from ray_dmml.training.run_dir import RunDir

        config = Config.parse(settings(self._work / "images", "direct", variant))
        if variant == "drop":
            last = RunDir.open(run).checkpoints.load("last")
            struck = {f"peer{fault['peer']}" for fault in faults}
            dropped = last.meta["dropped"]
            with tempfile.TemporaryDirectory(dir=self._work) as folder:
                return dropped.keys() <= struck and last.peers == after_drops(config, dropped, Path(folder))
        if variant not in self._found:
            alone = self._work / f"undisturbed-{variant}"
            train(config, alone, local=True, progress=False)
            self._found[variant] = outcome(alone)
        return bool(outcome(run) == self._found[variant])


def one_run(seed: int, undisturbed: Undisturbed, work: Path) -> dict[str, Any]:
    """Trains with the faults of a seed, on a small disk if one of them fills it, and returns the row of the run."""
    variant, transport, nodes, faults = draw(seed)
    folder = work / f"run-{seed}"
    disk = folder / "disk"
    disk.mkdir(parents=True)
    drawn = [f"{fault['what']}@{fault['step'] or fault['moment']}" for fault in faults]
    row = {"seed": seed, "peers": variant, "transport": transport, "nodes": nodes, "faults": drawn}
    kinds = {fault["what"] for fault in faults}
    raw = settings(work / "images", transport, variant, num_workers=int("kill view worker" in kinds))
    (folder / "plan.json").write_text(json.dumps({"settings": raw, "faults": faults, "nodes": nodes}))
    if "full disk" in kinds:
        mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return {**row, "equal": None, "why": "a small disk needs root"}
    began = time.monotonic()
    try:
        starts, failure = _drive_to_the_end(folder, len(faults))
        if failure:
            return {**row, "equal": False, "why": failure}
        seconds = round(time.monotonic() - began)
        is_equal = undisturbed.is_equal(variant, disk / "run", faults)
        return {**row, "starts": starts, **_what_happened(folder), "seconds": seconds, "equal": is_equal}
    finally:
        if "full disk" in kinds:  # what was written is kept for a look at it
            with suppress(OSError):
                shutil.copytree(disk / "run", folder / "run")
            subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def _drive_to_the_end(folder: Path, num_faults: int) -> tuple[int, str]:
    """Starts the driver until the run ends. Returns how often, and why the run did not end (or nothing)."""
    for starts in range(1, num_faults + 3):
        (folder / "disk" / "ballast").unlink(missing_ok=True)  # the driver that made it would have removed it
        with (folder / "log.txt").open("a") as log:
            command = [sys.executable, __file__, "--drive", str(folder)]
            driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                code = driver.wait(timeout=HANGS_S)
            except subprocess.TimeoutExpired:
                return starts, "it hangs"
            finally:
                _end_session(driver.pid)
        if code == 0:
            return starts, ""
        if code != -signal.SIGKILL:
            return starts, f"exit code {code}: {folder / 'log.txt'}"
    return starts, f"the driver was killed {starts} times, by {num_faults} faults: {folder / 'log.txt'}"


def _what_happened(folder: Path) -> dict[str, Any]:
    """How many faults struck, and the recoveries with their times, from the files that the driver wrote."""
    file = folder / "notes.jsonl"
    sentences = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    losses = [(at, text) for at, text in sentences if "go back from step" in text]
    hits = sorted(float(path.read_text()) for path in folder.glob("hit-*"))
    return {
        "struck": len(list(folder.glob("struck-*"))),
        "recoveries": len(losses),
        # Seconds since the latest fault before it.
        "detected_s": [round(at - max([hit for hit in hits if hit <= at], default=at), 1) for at, _ in losses],
        "steps_again": sum(_steps_again(text) for _, text in losses),
        "recovered_s": [float(text.split()[2]) for _, text in sentences if text.startswith("recovered in")],
    }


def _steps_again(text: str) -> int:
    words = text.split("go back from step ")[1].split()
    return int(words[0]) - int(words[2])


def _end_session(session: int) -> None:
    """What the driver had started, where it was killed: the next one starts at once."""
    for pid in processes_of(session):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def main(
    runs: Annotated[int, typer.Option(min=1, help="Runs.")] = 60,
    first_seed: Annotated[int, typer.Option(help="Seeds are this and the next ones.")] = 0,
    seed: Annotated[list[int] | None, typer.Option(help="These seeds instead.")] = None,
    rows: Annotated[Path | None, typer.Option(help="A JSON line a run is added here.")] = None,
    drive_in: Annotated[Path | None, typer.Option("--drive", hidden=True)] = None,
) -> None:
    """Kill anything at any time, and compare."""
    if drive_in is not None:
        drive(drive_in)
        return
    console = Console(width=160)
    work = Path(tempfile.mkdtemp(prefix="ray-dmml-chaos-"))
    is_right = True
    try:
        make_images(work / "images")
        undisturbed = Undisturbed(work)
        made_by = commit()
        for chosen in seed or range(first_seed, first_seed + runs):
            row = one_run(chosen, undisturbed, work)
            is_right &= row["equal"] is not False
            console.print(json.dumps(row), highlight=False, markup=False, soft_wrap=True)
            if rows is not None:
                with rows.open("a") as file:
                    file.write(json.dumps({**row, "commit": made_by}) + "\n")
            if row["equal"]:
                shutil.rmtree(work / f"run-{chosen}", ignore_errors=True)
    finally:
        if is_right:
            shutil.rmtree(work, ignore_errors=True)
    raise typer.Exit(0 if is_right else 1)


if __name__ == "__main__":
    typer.run(main)
