"""Peers that are killed, stopped or lost amid a run: it goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from ray_dmml.config.schema import Config, FailureConfig
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import Interrupted, PeerLostError, UserError
from ray_dmml.ray_backend import exchange as transports
from ray_dmml.ray_backend.coordinator import Coordinator
from ray_dmml.ray_backend.exchange import checksum
from ray_dmml.training.run_dir import RunDir
from ray_dmml.training.trainer import Silent, evaluate, train

STEPS = 16


@pytest.fixture(scope="module", autouse=True)
def _ray(ray_start_4_cpus: None) -> None:
    """All of these need it."""


class Faults(Silent):
    """Does something to a run once it is at a step, and keeps what is told."""

    def __init__(self, at: int, fault: Callable[[], None]) -> None:
        self.notes: list[str] = []
        self._at, self._fault, self._is_done = at, fault, False

    def note(self, message: str) -> None:
        self.notes.append(message)

    def step(self, finished: int) -> None:
        if finished >= self._at and not self._is_done:
            self._is_done = True
            self._fault()


def settings(root: Path, **changes: Any) -> Config:
    raw = tiny(
        root,
        **{
            "train": {"steps": STEPS, "evaluate_every": 8, "log_every": 2, "tensorboard": False},
            "checkpoint": {"every_steps": 4},
            "evaluation": {"recall_at": [1], "untrained": False},
            **changes,
        },
    )
    return Config.parse(raw)


@pytest.fixture
def cohorts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cohorts that runs make, to get at their processes."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    made: list[Any] = []
    plain = RayCohort.__init__

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(RayCohort, "__init__", kept)
    return made


def weights(run: Path) -> dict[str, dict[str, bytes]]:
    return RunDir.open(run).checkpoints.load("last").peers


@pytest.fixture(scope="module")
def undisturbed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(settings(image_folder), out, local=True)
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    assert weights(found) == weights(expected)
    assert RunDir(found).metrics_file.read_text() == RunDir(expected).metrics_file.read_text()


@pytest.mark.parametrize(
    "transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_peer_is_replaced(
    image_folder: Path,
    tmp_path: Path,
    undisturbed: Path,
    cohorts: list[Any],
    transport: str,
    how: signal.Signals,
) -> None:
    """Killed or stopped amid training: another takes its place, all go back to the checkpoint, and
    weights, optimisers and metrics are in the end those of a run without it."""
    config = settings(image_folder, failure={"heartbeat_timeout_s": 5})
    cohort = config.cohort.model_copy(update={"transport": transport})
    config = config.model_copy(update={"cohort": cohort})
    faults = Faults(6, lambda: os.kill(cohorts[0].pids["peer1"], how))
    train(config, tmp_path / "run", reporter=faults)
    assert_same_run(tmp_path / "run", undisturbed)
    why = "died in step" if how == signal.SIGKILL else "no sign of life for"
    [told] = [note for note in faults.notes if "all go back" in note]
    assert "peer1" in told and why in told and "to 4, restart 1 of 5" in told


def test_lost_before_the_first_checkpoint(
    image_folder: Path, tmp_path: Path, undisturbed: Path, cohorts: list[Any]
) -> None:
    """There is nothing to go back to: all are built anew, and end the same."""

    class AtFirstSave(Faults):
        def doing(self, what: str) -> None:
            if what == "saving a checkpoint":
                self.step(0)

    faults = AtFirstSave(0, lambda: os.kill(cohorts[0].pids["peer1"], signal.SIGKILL))
    train(settings(image_folder), tmp_path / "run", reporter=faults)
    assert_same_run(tmp_path / "run", undisturbed)
    assert any(
        "peer1 died" in note and "all start anew, restart 1 of 5" in note for note in faults.notes
    )


@pytest.mark.slow
def test_both_peers_and_the_coordinator(
    image_folder: Path, tmp_path: Path, undisturbed: Path, cohorts: list[Any]
) -> None:
    """Everything that the driver has started dies at once; the same end."""

    def fault() -> None:
        import ray

        for pid in cohorts[0].pids.values():
            os.kill(pid, signal.SIGKILL)
        ray.kill(cohorts[0]._coordinator)

    train(settings(image_folder), tmp_path / "run", reporter=Faults(10, fault))
    assert_same_run(tmp_path / "run", undisturbed)


def pids_of_replicas() -> list[int]:
    """By Ray's name of their processes, which a raylet has started, and this test that."""
    told = subprocess.run(["pgrep", "-f", "^ray::ReplicaActor"], capture_output=True, text=True)
    pids = [int(pid) for pid in told.stdout.split()]
    return [pid for pid in pids if parent_of(parent_of(pid)) == os.getpid()]


def parent_of(pid: int) -> int:
    """0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


@pytest.mark.slow
def test_a_lost_replica_is_replaced(image_folder: Path, tmp_path: Path) -> None:
    """One of two processes that share a peer's batches: the peer is started anew, and the end is that of
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
    train(config, tmp_path / "run", reporter=faults)
    assert any("peer1: one of its replicas was lost" in note for note in faults.notes), faults.notes
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    until = time.monotonic() + 30
    while pids_of_replicas():
        assert time.monotonic() < until, "a replica outlives its peer"
        time.sleep(0.2)
    found, expected = (losses(tmp_path / name) for name in ("run", "alone"))
    assert found[0] - found[-1] > 0.05  # the weights have moved
    assert found == pytest.approx(expected, rel=1e-4)


def losses(run: Path) -> list[float]:
    """Of the second peer, in the first 8 steps: roundings grow tenfold every few steps."""
    rows = [json.loads(line) for line in RunDir(run).metrics_file.read_text().splitlines()]
    return [row["peers"]["peer1"]["loss"] for row in rows if "peers" in row and row["step"] <= 8]


@pytest.mark.slow
def test_a_lost_coordinator_is_replaced(
    image_folder: Path, tmp_path: Path, undisturbed: Path, cohorts: list[Any]
) -> None:
    """The peers live on and meet at another."""
    import ray

    faults = Faults(6, lambda: ray.kill(cohorts[0]._coordinator))
    config = settings(image_folder)
    cohort = config.cohort.model_copy(update={"transport": "coordinator"})
    train(config.model_copy(update={"cohort": cohort}), tmp_path / "run", reporter=faults)
    assert_same_run(tmp_path / "run", undisturbed)
    assert any("the coordinator died" in note for note in faults.notes)


def test_no_more_restarts(image_folder: Path, tmp_path: Path, cohorts: list[Any]) -> None:
    """The run ends by name, and what it has kept can be resumed."""
    config = settings(image_folder, failure={"max_failures": 0})
    faults = Faults(6, lambda: os.kill(cohorts[0].pids["peer0"], signal.SIGKILL))
    with pytest.raises(PeerLostError, match=r"peer0 died.*max_failures, 0.*step 4 is whole"):
        train(config, tmp_path / "run", reporter=faults)
    assert RunDir.open(tmp_path / "run").checkpoints.load("last").step == 4


def test_going_on_without_a_peer(image_folder: Path, tmp_path: Path, cohorts: list[Any]) -> None:
    """`drop`: the others learn from each other alone from the checkpoint on, what the lost one was is
    kept, the result is of those that are left, and a resumed run has all again."""
    raw = tiny(image_folder)["cohort"]
    config = settings(
        image_folder,
        cohort={**raw, "peers": [{}, {"view": "weak"}, {"view": "strong"}]},
        failure={"on_peer_loss": "drop", "max_failures": 0},
    )
    out = tmp_path / "run"
    faults = Faults(6, lambda: os.kill(cohorts[0].pids["peer1"], signal.SIGKILL))
    results = train(config, out, reporter=faults)
    assert set(results["peers"]) == {"peer0", "peer2"} and results["dropped"] == {"peer1": 4}
    assert "without peer1 from step 4 on" in faults.notes
    last = RunDir.open(out).checkpoints.load("last")
    assert last.meta["dropped"] == {"peer1": 4} and set(last.peers) == {"peer0", "peer1", "peer2"}
    assert set(evaluate(out)["peers"]) == {"peer0", "peer2"}

    # The two that are left are, from step 4 on, a cohort of two.
    two = config.cohort.model_copy(
        update={"peers": (config.cohort.peers[0], config.cohort.peers[2])}
    )
    from ray_dmml.cohort.local import LocalCohort

    with closing(LocalCohort(config, load_splits(config.data))) as three:
        three.run(0, 4, lambda finished: None)
        at_4 = three.state()
    assert last.peers["peer1"] == at_4["peer1"]
    pair = config.model_copy(update={"cohort": two})
    with closing(LocalCohort(pair, load_splits(config.data), initial_weights=False)) as local:
        local.load(at_4)
        local.run(4, STEPS, lambda finished: None)
        assert local.state() == {name: last.peers[name] for name in ("peer0", "peer2")}

    longer = config.model_copy(
        update={"train": config.train.model_copy(update={"steps": STEPS + 4})}
    )
    notes = Faults(10**9, lambda: None)
    results = train(longer, resume=out, reporter=notes)
    assert set(results["peers"]) == {"peer0", "peer1", "peer2"} and "dropped" not in results
    assert "peer1, dropped at step 4, takes part again" in notes.notes


def test_nobody_left(image_folder: Path, tmp_path: Path, cohorts: list[Any]) -> None:
    """`drop` and every peer is dead: the run ends and says so."""
    config = settings(image_folder, failure={"on_peer_loss": "drop", "max_failures": 0})

    def fault() -> None:
        for pid in cohorts[0].pids.values():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(UserError, match="peer0, peer1: lost, and no peer is left"):
        train(config, tmp_path / "run", reporter=Faults(6, fault))
    assert RunDir.open(tmp_path / "run").checkpoints.load("last").step == 4


def test_a_busy_peer_is_not_dropped(
    image_folder: Path, tmp_path: Path, cohorts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was not lost and gives no answer in time is started anew: only the killed one is
    dropped."""
    from ray_dmml.ray_backend import ray_cohort as remote

    flag = tmp_path / "slept"

    class Sleepy(remote.PeerActor):
        """Sits out the wait for answers after another's death."""

        def call(self, method: str, *arguments: Any) -> Any:
            try:
                return super().call(method, *arguments)
            except PeerLostError:
                if not flag.exists():
                    flag.touch()
                    time.sleep(60)
                raise

    monkeypatch.setattr(remote, "PeerActor", Sleepy)
    monkeypatch.setattr(remote, "GRACE_S", 2.0)
    raw = tiny(image_folder)["cohort"]
    config = settings(
        image_folder,
        cohort={**raw, "peers": [{}, {"view": "weak"}, {"view": "strong"}]},
        failure={"on_peer_loss": "drop", "max_failures": 0},
    )
    faults = Faults(6, lambda: os.kill(cohorts[0].pids["peer1"], signal.SIGKILL))
    results = train(config, tmp_path / "run", reporter=faults)
    assert flag.exists()
    assert results["dropped"] == {"peer1": 4} and set(results["peers"]) == {"peer0", "peer2"}


def test_none_is_dropped_on_suspicion(image_folder: Path) -> None:
    """Of peers that got equally far one may hang: all start anew. One that is known to is dropped."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = settings(image_folder, cohort={**tiny(image_folder)["cohort"], "peers": [{}] * 3})
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        before = cohort.pids
        cohort._suspects = ("peer0", "peer1")
        cohort.recover(drop=True)
        assert cohort.names == ("peer0", "peer1", "peer2")
        assert [name for name, pid in cohort.pids.items() if pid == before[name]] == ["peer2"]
        cohort._stuck = ("peer1",)
        cohort.recover(drop=True)
        assert cohort.names == ("peer0", "peer2")


def test_one_that_was_never_built_is_started_anew(image_folder: Path) -> None:
    """As where another was lost while it waited to be built. It is not lost itself."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = settings(image_folder)
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        state = cohort.state()
        cohort._end_peer("peer1")
        cohort._actors["peer1"] = cohort._start_actor(1)
        cohort.recover(drop=True)
        assert cohort.names == ("peer0", "peer1")
        cohort.load(state)
        (row,) = cohort.run(0, 1, lambda finished: None)
        assert all(terms["loss"] > 0 for terms in row.values())


def test_a_stopped_driver_finds_nobody_silent() -> None:
    """The time in which this process itself was stopped is nobody's silence."""
    from ray_dmml.ray_backend.coordinator import PeerStatus
    from ray_dmml.ray_backend.ray_cohort import LONGEST_LOOK_S, _Watch

    watch = _Watch(1.5 * LONGEST_LOOK_S, FailureConfig(node_timeout_s=1e9), {})
    signs = {"peer0": PeerStatus(sent=1, chunks=0, silent_s=0.5)}
    watch.look(signs, signs)
    watch._before -= 3600.0
    watch.look(signs, signs)
    watch._before -= LONGEST_LOOK_S
    with pytest.raises(PeerLostError, match="peer0: no progress for 9 s"):
        watch.look(signs, signs)


def test_who_is_stopped_is_told_from_who_waits() -> None:
    """By the sign that a living process gives whatever it is at; of those that live, who got least far
    is the cause, and all are suspects that got equally far."""
    from ray_dmml.ray_backend.coordinator import PeerStatus
    from ray_dmml.ray_backend.ray_cohort import LONGEST_LOOK_S, _Watch

    def look(patience: float, **signs: PeerStatus) -> PeerLostError | None:
        watch = _Watch(patience, FailureConfig(node_timeout_s=1e9, heartbeat_timeout_s=60), {})
        try:
            watch.look(signs, signs)
            watch._before -= LONGEST_LOOK_S
            watch.look(signs, signs)
        except PeerLostError as loss:
            return loss
        return None

    waits, ahead = PeerStatus(7, 0, 0.5), PeerStatus(8, 0, 0.5)
    loss = look(100, a=waits, b=PeerStatus(7, 0, 61.0), c=waits)
    assert loss is not None and loss.stuck == ("b",) and loss.suspects == ()
    assert look(3, a=waits, b=PeerStatus(7, 0, 30.0), c=waits) is None  # in 30 s all will know
    loss = look(3, a=ahead, b=waits, c=ahead)
    assert loss is not None and loss.stuck == ("b",)
    loss = look(3, a=waits, b=waits, c=ahead)
    assert loss is not None and loss.stuck == () and loss.suspects == ("a", "b")
    assert look(3, a=waits) is not None and look(100, a=waits) is None


def test_asked_to_stop(image_folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The run ends after a step, with a checkpoint of it, and goes on to the same bits."""
    reached = [0]

    class Steps(Silent):
        def step(self, finished: int) -> None:
            reached[0] = finished

    config = settings(image_folder)
    with pytest.raises(Interrupted, match=r"stopped at step \d+ of 16"):
        train(config, tmp_path / "run", reporter=Steps(), should_stop=lambda: reached[0] >= 5)
    assert 5 <= RunDir.open(tmp_path / "run").checkpoints.load("last").step < STEPS
    train(resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_late_message_of_an_old_generation(image_folder: Path) -> None:
    """It reaches nobody: its coordinator has ended, and the new one was never given to its sender.
    And all that were waiting for the dead peer, or for one that did, are woken and live on."""
    import ray

    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = settings(image_folder, cohort={**tiny(image_folder)["cohort"], "peers": [{}] * 4})
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        old = cohort._coordinator
        state = cohort.state()
        os.kill(cohort.pids["peer0"], signal.SIGKILL)
        with pytest.raises(PeerLostError):
            cohort.run(0, 2, lambda finished: None)
        before = cohort.pids
        cohort.recover()
        assert [name for name, pid in cohort.pids.items() if pid != before[name]] == ["peer0"]
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(old.report.remote(0, 99, 0))
        cohort.load(state)
        assert {sign.sent for sign in cohort._signs().values()} == {0}


def test_an_embedding_damaged_on_its_way(
    image_folder: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by its checksum, and the steps are done again."""
    from ray_dmml.ray_backend import ray_cohort as remote

    flag = (
        tmp_path / "damaged"
    )  # the next generation has another process, which must not do so again

    class Damaging(Coordinator):
        """Flips a bit of one embedding."""

        async def exchange(
            self, step: int, rank: int, teachers: Any, expected: int, *parts: Any
        ) -> list[Any]:
            if step == 6 and rank == 1 and not flag.exists():
                flag.touch()
                parts = (parts[0].copy(), *parts[1:])
                parts[0].view("u1").reshape(-1)[5] ^= 4
            return await Coordinator.exchange(self, step, rank, teachers, expected, *parts)

    monkeypatch.setattr(remote, "Coordinator", Damaging)
    config = settings(image_folder)
    cohort = config.cohort.model_copy(update={"transport": "coordinator"})
    faults = Faults(10**9, lambda: None)
    train(config.model_copy(update={"cohort": cohort}), tmp_path / "run", reporter=faults)
    [told] = [note for note in faults.notes if "all go back" in note]
    assert (
        "embeddings of peer1 of step 7 were damaged on their way; all go back from step 6" in told
    )
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 512)])
def test_a_checksum_sees_every_change(shape: tuple[int, int]) -> None:
    """A flipped bit, swapped numbers, a zero's sign."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    right = int(checksum(rows))
    assert int(checksum(rows.clone())) == right
    for bit in range(32):
        changed = rows.clone()
        changed.view(torch.int32)[-1, 0] ^= 1 << bit if bit < 31 else -(2**31)
        assert int(checksum(changed)) != right
    if rows.numel() > 1:
        assert int(checksum(rows.flip(0, 1))) != right
    assert int(checksum(torch.zeros(1, 2))) != int(checksum(torch.tensor([[0.0, -0.0]])))
    with pytest.raises(PeerLostError, match="peer9 of step 3 were damaged"):
        transports._verified(rows, right + 1, "peer9", 2)


def test_a_full_disk_at_times(image_folder: Path, tmp_path: Path) -> None:
    """Checkpoints and metrics that find no room are told, training goes on, and once there is room
    nothing is missing or there twice."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted: needs root")
    ballast = disk / "ballast"

    class Full(Silent):
        notes: list[str]

        def __init__(self) -> None:
            self.notes = []

        def note(self, message: str) -> None:
            self.notes.append(message)

        def step(self, finished: int) -> None:
            if finished == 6:
                with suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(2**12))
            if finished == 11:
                ballast.unlink(missing_ok=True)

    try:
        full = Full()
        config = settings(image_folder)
        events = config.train.model_copy(update={"tensorboard": True})
        config = config.model_copy(update={"train": events})
        train(config, disk / "run", reporter=full, local=True)
        train(config, tmp_path / "undisturbed", local=True)
        assert_same_run(disk / "run", tmp_path / "undisturbed")
        assert any("checkpoint of step 8 cannot be written" in note for note in full.notes)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
