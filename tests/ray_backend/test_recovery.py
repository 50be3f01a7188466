"""Peers that are killed, stopped or lost amid a run: it goes on and ends with the same bits."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
import safetensors.torch
import timm
from conftest import state_of, tiny

from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import PeerLostError, UserError
from ray_dmml.loggers.logger import Logger
from ray_dmml.ray_backend.coordinator import Coordinator
from ray_dmml.ray_backend.peer_actor import PeerActor
from ray_dmml.ray_backend.ray_cohort import RayCohort
from ray_dmml.training.evaluate import evaluate
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir

pytestmark = pytest.mark.ray


STEPS = 16


@pytest.fixture(autouse=True)
def _ray(ray_start_4_cpus: None) -> None:
    """All of these need it."""


class Faults(Logger):
    """Does something to a run once it is at a step."""

    def __init__(self, at: int, fault: Callable[[], None]) -> None:
        self._at, self._fault, self._is_done = at, fault, False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if not metrics and step >= self._at and not self._is_done:
            self._is_done = True
            self._fault()


@pytest.fixture(autouse=True)
def sentences(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the run says."""
    caplog.set_level(logging.DEBUG, "ray_dmml")
    return lambda: [record.getMessage() for record in caplog.records]


def settings(root: Path, **changes: Any) -> Config:
    raw = tiny(
        root,
        **{
            "train": {"steps": STEPS, "evaluate_every": 8, "log_every": 2, "tensorboard": False, "report": False},
            "checkpoint": {"every_steps": 4},
            "evaluation": {"recall_at": [1], "untrained": False},
            **changes,
        },
    )
    return Config.parse(raw)


def one_peer(root: Path) -> dict[str, Any]:
    return {**tiny(root)["cohort"], "peers": [{}]}


class Watched(RayCohort):
    """Keeps the cohorts that runs make, to get at their processes."""

    made: ClassVar[list[Watched]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.made.append(self)
        super().__init__(*args, **kwargs)


@pytest.fixture
def cohorts() -> list[Watched]:
    Watched.made.clear()
    return Watched.made


def kill(cohorts: list[Watched], name: str, how: signal.Signals = signal.SIGKILL) -> None:
    os.kill(cohorts[-1].places[name].pid, how)


def pids(cohort: RayCohort) -> dict[str, int]:
    return {name: place.pid for name, place in cohort.places.items()}


def weights(run: Path) -> dict[str, PeerFiles]:
    return RunDir.open(run).checkpoints.load("last").peers


@pytest.fixture(scope="module")
def undisturbed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(settings(image_folder), out, local=True)
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    assert weights(found) == weights(expected)
    assert RunDir(found).metrics_file.read_text() == RunDir(expected).metrics_file.read_text()


class ThreeLosses(Logger):
    """Kills a peer before the first checkpoint and again at step 6, and stops one at step 10."""

    def __init__(self, cohorts: list[Watched]) -> None:
        self._cohorts = cohorts
        self._left = [(0, "peer1", signal.SIGKILL), (6, "peer1", signal.SIGKILL), (10, "peer0", signal.SIGSTOP)]

    def _strike(self, step: int) -> None:
        if self._left and step >= self._left[0][0]:
            _, name, how = self._left.pop(0)
            kill(self._cohorts, name, how)

    def rewind(self, step: int) -> None:
        if len(self._left) == 3:  # the first rewind comes between the start of the peers and the first checkpoint
            self._strike(0)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if not metrics and step > 0:
            self._strike(step)


@pytest.mark.parametrize("transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)])
def test_a_lost_peer_is_replaced(
    image_folder: Path,
    tmp_path: Path,
    undisturbed: Path,
    cohorts: list[Watched],
    transport: str,
    sentences: Callable[[], list[str]],
) -> None:
    """Killed or stopped: another takes its place, and all go back to the checkpoint or, where there is none, start
    again. In the end weights, optimisers and metrics are those of a run without it."""
    config = settings(image_folder, failure={"heartbeat_timeout_s": 5})
    cohort = config.cohort.model_copy(update={"transport": transport})
    config = config.model_copy(update={"cohort": cohort})
    train(config, tmp_path / "run", loggers=[ThreeLosses(cohorts)], cohort_factory=Watched)
    assert_same_run(tmp_path / "run", undisturbed)
    found = [note for note in sentences() if "(restart" in note]
    expected = [
        r"peer1 died.*: its process was killed.*all peers start again \(restart 1 of 5\)",
        r"peer1 died in step \d+: its process was killed.*all peers go back from step \d+ to 4 \(restart 2 of 5\)",
        r"peer0: no sign of life for 5 s.*all peers go back from step \d+ to 8 \(restart 3 of 5\)",
    ]
    assert len(found) == 3 and all(map(re.match, expected, found)), found


@pytest.mark.slow
def test_a_lost_frozen_teacher_embeds_its_images_again(
    image_folder: Path, tmp_path: Path, cohorts: list[Watched]
) -> None:
    """It keeps embeddings of all training images, which are lost with its process."""
    weights = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), weights)
    teacher = {"name": "vit", "backbone": "test_vit", "weights": str(weights), "frozen": True}
    config = settings(image_folder, cohort={"peers": [{}, {**teacher, "teacher_view": "evaluation"}]})
    train(config, tmp_path / "undisturbed", local=True)
    faults = Faults(6, lambda: kill(cohorts, "vit"))
    train(config, tmp_path / "run", loggers=[faults], cohort_factory=Watched)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.slow
def test_both_peers_and_the_coordinator(
    image_folder: Path,
    tmp_path: Path,
    undisturbed: Path,
    cohorts: list[Watched],
    sentences: Callable[[], list[str]],
) -> None:
    """Everything that the driver has started dies at once; the same end."""

    def fault() -> None:
        for pid in [place.pid for place in cohorts[0].places.values()]:
            os.kill(pid, signal.SIGKILL)
        ray.kill(cohorts[0].coordinator)

    train(
        settings(image_folder),
        tmp_path / "run",
        loggers=[Faults(10, fault)],
        cohort_factory=Watched,
    )
    assert_same_run(tmp_path / "run", undisturbed)
    assert any("all peers" in note and "(restart 1 of 5)" in note for note in sentences())


def pids_of_replicas() -> list[int]:
    """By Ray's name of their processes, which a raylet has started, and this test that."""
    listed = subprocess.run(["pgrep", "-f", "^ray::ReplicaActor"], capture_output=True, text=True)
    pids = [int(pid) for pid in listed.stdout.split()]
    return [pid for pid in pids if parent_of(parent_of(pid)) == os.getpid()]


def parent_of(pid: int) -> int:
    """0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


@pytest.mark.slow
def test_a_lost_replica_is_replaced(image_folder: Path, tmp_path: Path, sentences: Callable[[], list[str]]) -> None:
    """One of two processes that share a peer's batches: the peer is started again, and the end is that of
    a run without it, to the bit; peers in one process learn the same, to rounding."""
    raw = settings(image_folder).model_dump(mode="json")
    for peer in raw["cohort"]["peers"]:
        peer |= {"batch_norm": "frozen", "optimizer": {"name": "sgd", "lr": 1e-3}}
    raw["cohort"]["peers"][1] |= {"replicas": 2, "num_cpus": 2}
    config = Config.parse(raw)
    train(config, tmp_path / "alone", local=True)
    train(config, tmp_path / "undisturbed")
    assert RunDir(tmp_path / "undisturbed").environment()["devices"] == ["cpu", "cpu x 2"]

    def kill() -> None:
        (pid,) = pids_of_replicas()
        os.kill(pid, signal.SIGKILL)

    faults = Faults(9, kill)
    train(config, tmp_path / "run", loggers=[faults], cohort_factory=Watched)
    assert any("peer1: one of its replicas was lost" in note for note in sentences()), sentences()
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    until = time.monotonic() + 30
    while pids_of_replicas():
        assert time.monotonic() < until, "a replica outlives its peer"
        time.sleep(0.2)
    found, expected = (losses(tmp_path / name) for name in ("run", "alone"))
    assert found[0] - found[-1] > 0.05  # the weights have moved
    assert found == pytest.approx(expected, rel=1e-4)


def children_of(pid: int) -> list[int]:
    processes = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [child for child in processes if parent_of(child) == pid]


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_lost_view_worker_is_replaced(
    image_folder: Path,
    tmp_path: Path,
    undisturbed: Path,
    cohorts: list[Watched],
    sentences: Callable[[], list[str]],
    local: bool,
) -> None:
    """Its peer is started again, or in one process the worker alone. The end is that of a run without workers."""
    raw = settings(image_folder).model_dump(mode="json")
    raw["cohort"]["threads_per_peer"] = 1
    raw["cohort"]["peers"][1]["num_workers"] = 2
    config = Config.parse(raw)

    def fault() -> None:
        owner = os.getpid() if local else cohorts[-1].places["peer1"].pid
        workers = [worker for child in children_of(owner) for worker in children_of(child)]
        workers = [pid for pid in workers if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)

    train(config, tmp_path / "run", local=local, loggers=[Faults(6, fault)], cohort_factory=None if local else Watched)
    lost = r"peer1: view worker [12] of 2 \(process \d+\) was killed by SIGKILL; all peers go back .*restart 1 of 5"
    assert any(re.match(lost, note) for note in sentences()), sentences()
    assert_same_run(tmp_path / "run", undisturbed)


def losses(run: Path) -> list[float]:
    """Of the second peer, in the first 8 steps: roundings grow tenfold every few steps."""
    rows = [json.loads(line) for line in RunDir(run).metrics_file.read_text().splitlines()]
    return [row["peers"]["peer1"]["loss"] for row in rows if "peers" in row and row["step"] <= 8]


@pytest.mark.slow
def test_a_lost_coordinator_is_replaced(
    image_folder: Path,
    tmp_path: Path,
    undisturbed: Path,
    cohorts: list[Watched],
    sentences: Callable[[], list[str]],
) -> None:
    """The peers live on and meet at another."""
    faults = Faults(6, lambda: ray.kill(cohorts[0].coordinator))
    config = settings(image_folder)
    cohort = config.cohort.model_copy(update={"transport": "coordinator"})
    train(
        config.model_copy(update={"cohort": cohort}),
        tmp_path / "run",
        loggers=[faults],
        cohort_factory=Watched,
    )
    assert_same_run(tmp_path / "run", undisturbed)
    assert any("the coordinator died" in note for note in sentences())


def test_no_more_restarts(image_folder: Path, tmp_path: Path, cohorts: list[Watched]) -> None:
    """The run ends by name, and what it has kept can be resumed."""
    config = settings(image_folder, cohort=one_peer(image_folder), failure={"max_failures": 0})
    faults = Faults(6, lambda: kill(cohorts, "peer0"))
    with pytest.raises(UserError, match=r"peer0 died.*max_failures is 0.*step 4 is complete") as ended:
        train(config, tmp_path / "run", loggers=[faults], cohort_factory=Watched)
    assert not isinstance(ended.value, PeerLostError)
    assert RunDir.open(tmp_path / "run").checkpoints.load("last").step == 4


def test_going_on_without_a_peer(
    image_folder: Path,
    tmp_path: Path,
    cohorts: list[Watched],
    sentences: Callable[[], list[str]],
) -> None:
    """`drop`: the others learn from each other alone from the checkpoint on, what the lost one was is
    kept, the result is of those that are left, and a resumed run has all again."""
    raw = tiny(image_folder)["cohort"]
    config = settings(
        image_folder,
        cohort={**raw, "peers": [{}, {"view": "weak"}, {"view": "strong"}]},
        failure={"on_peer_loss": "drop", "max_failures": 0},
    )
    out = tmp_path / "run"
    faults = Faults(6, lambda: kill(cohorts, "peer1"))
    results = train(config, out, loggers=[faults], cohort_factory=Watched)
    assert set(results["peers"]) == {"peer0", "peer2"} and results["dropped"] == {"peer1": 4}
    assert "without peer1 from step 4 on" in sentences()
    last = RunDir.open(out).checkpoints.load("last")
    assert last.meta["dropped"] == {"peer1": 4} and set(last.peers) == {"peer0", "peer1", "peer2"}
    assert set(evaluate(out)["peers"]) == {"peer0", "peer2"}

    # The two that are left are, from step 4 on, a cohort of two.
    two = config.cohort.model_copy(update={"peers": (config.cohort.peers[0], config.cohort.peers[2])})
    with closing(LocalCohort(config, load_splits(config.data))) as three:
        three.run(0, 4, lambda finished: None)
        at_4 = state_of(three)
    assert last.peers["peer1"] == at_4["peer1"]
    pair = config.model_copy(update={"cohort": two})
    with closing(LocalCohort(pair, load_splits(config.data), initial_weights=False)) as local:
        local.load(at_4)
        local.run(4, STEPS, lambda finished: None)
        assert state_of(local) == {name: last.peers[name] for name in ("peer0", "peer2")}

    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS + 4})})
    results = train(longer, resume=out, local=True)
    assert set(results["peers"]) == {"peer0", "peer1", "peer2"} and "dropped" not in results
    assert "peer1, dropped at step 4, takes part again" in sentences()


@pytest.mark.slow  # it waits until peers count as stuck
def test_a_busy_peer_is_not_dropped(image_folder: Path, tmp_path: Path, cohorts: list[Watched]) -> None:
    """One that was not lost and gives no answer in time is started again: only the killed one is
    dropped."""
    flag = tmp_path / "slept"

    class Sleepy(PeerActor):
        """Sits out the wait for answers after another's death."""

        def run(self, start: int, stop: int) -> Any:
            try:
                return super().run(start, stop)
            except PeerLostError:
                if not flag.exists():
                    flag.touch()
                    time.sleep(60)
                raise

    class SleepyCohort(Watched):
        peer_class = Sleepy
        grace_s = 2.0

    raw = tiny(image_folder)["cohort"]
    config = settings(
        image_folder,
        cohort={**raw, "peers": [{}, {"view": "weak"}, {"view": "strong"}]},
        failure={"on_peer_loss": "drop", "max_failures": 0},
    )
    faults = Faults(6, lambda: kill(cohorts, "peer1"))
    results = train(config, tmp_path / "run", loggers=[faults], cohort_factory=SleepyCohort)
    assert flag.exists()
    assert results["dropped"] == {"peer1": 4} and set(results["peers"]) == {"peer0", "peer2"}


@pytest.mark.slow  # it waits until peers count as stuck
def test_none_is_dropped_on_suspicion(image_folder: Path) -> None:
    """Of peers that got equally far one may hang: all start again. One that is known to is dropped."""
    config = settings(image_folder, cohort={**tiny(image_folder)["cohort"], "peers": [{}] * 3})
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        before = pids(cohort)
        cohort.recover(PeerLostError("", suspects=("peer0", "peer1")), drop=True)
        assert cohort.names == ("peer0", "peer1", "peer2")
        assert [name for name, pid in pids(cohort).items() if pid == before[name]] == ["peer2"]
        cohort.recover(PeerLostError("", stuck=("peer1",)), drop=True)
        assert cohort.names == ("peer0", "peer2")


def test_the_generations_of_a_cohort(image_folder: Path, tmp_path: Path) -> None:
    """A late message of an old one reaches nobody: its coordinator has ended, and the new one was never given to its
    sender. All that were waiting for the dead peer, or for one that did, are woken and live on. One that was never
    built, as where another was lost while it waited to be built, is started again and not dropped. If all are dead, the
    error says so."""
    config = settings(image_folder, cohort={**tiny(image_folder)["cohort"], "peers": [{}] * 3})
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        old = cohort.coordinator
        state = cohort.save(tmp_path)
        os.kill(cohort.places["peer0"].pid, signal.SIGKILL)
        before = pids(cohort)
        with pytest.raises(PeerLostError) as failure:
            cohort.run(0, 2, lambda finished: None)
        cohort.recover(failure.value)
        assert [name for name, pid in pids(cohort).items() if pid != before[name]] == ["peer0"]
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(old.report.remote(0, 99, 0))
        cohort.load(state)
        assert {status.num_sent for status in cohort.statuses().values()} == {0}

        ray.kill(cohort.actors["peer1"])
        cohort.actors["peer1"] = cohort.start_actor("peer1")
        cohort.recover(PeerLostError(""), drop=True)
        assert cohort.names == ("peer0", "peer1", "peer2")
        cohort.load(state)
        (row,) = cohort.run(0, 1, lambda finished: None)
        assert all(terms["loss"] > 0 for terms in row.values())

        for pid in pids(cohort).values():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerLostError) as failure:
            cohort.run(1, 2, lambda finished: None)
        with pytest.raises(UserError, match="lost, and no peer that learns is left to go on") as ended:
            cohort.recover(failure.value, drop=True)
        assert all(name in str(ended.value) for name in ("peer0", "peer1", "peer2"))


def test_an_embedding_damaged_on_its_way(
    image_folder: Path,
    tmp_path: Path,
    undisturbed: Path,
    sentences: Callable[[], list[str]],
) -> None:
    """It is refused by its checksum, and the steps are done again."""
    flag = tmp_path / "damaged"  # the next generation has another process, which must not do so again

    class Damaging(Coordinator):
        """Flips a bit of one embedding."""

        async def exchange(self, step: int, rank: int, teachers: Any, expected: int, *parts: Any) -> list[Any]:
            if step == 6 and rank == 1 and not flag.exists():
                flag.touch()
                parts = (parts[0].copy(), *parts[1:])
                parts[0].view("u1").reshape(-1)[5] ^= 4
            return await Coordinator.exchange(self, step, rank, teachers, expected, *parts)

    class DamagingCohort(RayCohort):
        coordinator_class = Damaging

    config = settings(image_folder)
    cohort = config.cohort.model_copy(update={"transport": "coordinator"})
    train(
        config.model_copy(update={"cohort": cohort}),
        tmp_path / "run",
        cohort_factory=DamagingCohort,
    )
    [sentence] = [note for note in sentences() if "all peers go back" in note]
    assert "embeddings of peer1 at step 7 were damaged on their way; all peers go back from step 6" in sentence
    assert_same_run(tmp_path / "run", undisturbed)
