"""Peers write and read their own files of a checkpoint, also where they cannot reach the run's folder, and whoever dies
in the middle of one costs no more than the steps since the one before."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config
from ray_dmml.ray_backend import file_transfer
from ray_dmml.ray_backend.peer_actor import PeerActor
from ray_dmml.ray_backend.ray_cohort import RayCohort
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir

pytestmark = pytest.mark.ray

STEPS = 10


def settings(root: Path) -> dict[str, Any]:
    return tiny(
        root,
        train={"steps": STEPS, "evaluate_every": 5, "tensorboard": False, "report": False, "pictures": 0},
        evaluation={"recall_at": [1], "untrained": False},
    )


@pytest.fixture(scope="module")
def undisturbed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(Config.parse(settings(image_folder)), out, local=True)
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    """Also in the checkpoints' folder: nothing of an attempt is left."""
    runs = [RunDir(found), RunDir(expected)]
    for which in ("last", "best"):
        one, other = (run.checkpoints.load(which) for run in runs)
        assert (one.step, one.peers) == (other.step, other.peers)
    one, other = ({file.name for file in run.checkpoints.folder.iterdir()} for run in runs)
    assert one == other
    assert runs[0].metrics_file.read_text() == runs[1].metrics_file.read_text()


def test_one_far_away_and_one_killed(
    ray_start_4_cpus: None,
    image_folder: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """peer1 does not reach the run's folder: its files come and go in chunks, in both directions. peer0 finds no room
    for its first files, which costs that checkpoint. Later it is killed once it has written its files and before they
    are on the disk: all go back to the checkpoint before, from a relative path. The run ends with the bits of one in a
    single process."""
    killed, sent = tmp_path / "killed", tmp_path / "sent"
    sent.mkdir()

    class Peer(PeerActor):
        def reaches(self, folder: Path, mode: int) -> bool:
            return self._peer.name == "peer0" and super().reaches(folder, mode)

        def save(self, folder: Path) -> Any:
            if self._peer.name == "peer0" and "step-00000002" in str(folder):
                raise OSError(28, "No space left on device")
            if self._peer.name == "peer0" and "step-00000006" in str(folder) and not killed.exists():
                killed.touch()
                name, kill = "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL)
                setattr(os, name, kill)
            return super().save(folder)

        def read_chunk(self, name: str, start: int, size: int) -> bytes:
            (sent / f"from-{self._peer.name}").touch()
            return super().read_chunk(name, start, size)

        def write_chunk(self, name: str, chunk: bytes) -> None:
            (sent / f"to-{self._peer.name}").touch()
            super().write_chunk(name, chunk)

    class Cohort(RayCohort):
        peer_class = Peer

    monkeypatch.setattr(file_transfer, "CHUNK", 100_000)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        train(Config.parse(settings(image_folder)), "run", cohort_factory=Cohort)
    assert killed.exists() and {file.name for file in sent.iterdir()} == {"from-peer1", "to-peer1"}
    assert "checkpoint of step 2 cannot be written: [Errno 28] No space left on device; training goes on" in caplog.text
    assert "peer0 died" in caplog.text and "all peers go back from step 6 to 5" in caplog.text
    assert_same_run(tmp_path / "run", undisturbed)


DRIVER = """
import os, signal, sys, time
from pathlib import Path

from ray_dmml.config.schema import Config
from ray_dmml.ray_backend.peer_actor import PeerActor
from ray_dmml.ray_backend.ray_cohort import RayCohort
from ray_dmml.training.run import train

driver = os.getpid()


class Killing(PeerActor):
    def save(self, folder):
        if self._peer.name == "peer1" and "step-00000006" in str(folder):
            while not (folder.parent / "peer0" / "training.pt").exists():
                time.sleep(0.01)
            os.kill(driver, signal.SIGKILL)
            time.sleep(600)
        return super().save(folder)


class Cohort(RayCohort):
    peer_class = Killing


train(Config.load(Path(sys.argv[1])), sys.argv[2], cohort_factory=Cohort)
"""


def test_the_driver_killed_between_two_peers_files(image_folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The checkpoint before is the last, and the resumed run ends with the bits of an undisturbed one."""
    config = tmp_path / "config.yaml"
    config.write_text(yamlio.dump(settings(image_folder)))
    run = tmp_path / "run"
    command = [sys.executable, "-c", DRIVER, str(config), str(run)]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = driver.communicate(timeout=200)
        assert driver.returncode == -signal.SIGKILL, errors
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    store = RunDir(run).checkpoints
    [half] = [path for path in store.folder.iterdir() if path.name.startswith(".step-00000006")]
    assert (half / "peer0" / "training.pt").exists() and not list((half / "peer1").iterdir())
    assert store.load("last").step == 5
    train(resume=run, local=True)
    assert_same_run(run, undisturbed)
