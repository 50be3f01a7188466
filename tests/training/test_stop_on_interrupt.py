"""Ctrl-C in a program that calls train(). How a notebook's stop button does is in test_in_a_notebook.py."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from ray_dmml import Config, Logger, train
from ray_dmml.errors import Interrupted, Stopped
from ray_dmml.training.run_dir import RunDir


@pytest.fixture(autouse=True)
def handler_of_python() -> Iterator[None]:
    """A shell starts what is in the background with an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Presses(Logger):
    """Presses Ctrl-C once or more, when the run has finished a step."""

    def __init__(self, step: int, times: int = 1) -> None:
        self._step, self._times = step, times

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if not metrics and step >= self._step:
            times, self._times = self._times, 0
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)


class PressesAtTheStart(Logger):
    def rewind(self, step: int) -> None:
        signal.raise_signal(signal.SIGINT)


def config(root: Path, **changes: Any) -> Config:
    return Config.parse(tiny(root, evaluation={"recall_at": [1], "untrained": False}, **changes))


def last_step(run: Path) -> int:
    return RunDir.open(run).checkpoints.load("last").step


def test_the_run_stops_after_its_step_and_goes_on_later(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends like an undisturbed one, to the bit. Python's handler is there again."""
    monkeypatch.chdir(tmp_path)
    settings = config(image_folder, checkpoint={"every_steps": 0})
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(settings, "a run", local=True, loggers=[Presses(1)])
    step = last_step(Path("a run"))
    assert 1 <= step < 6
    assert str(stopped.value) == f"stopped at step {step} of 6; train(resume='a run', local=True) continues the run"
    assert "stopping after this step, with a checkpoint; a second interrupt stops at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(resume="a run", local=True, progress=False)
    assert resumed["ensemble"] == train(settings, "undisturbed", local=True, progress=False)["ensemble"]
    assert (
        RunDir(Path("a run")).checkpoints.load("last").peers
        == RunDir(Path("undisturbed")).checkpoints.load("last").peers
    )


def test_a_notebook_shows_the_message_only() -> None:
    assert Stopped("stopped at step 2")._render_traceback_() == ["KeyboardInterrupt: stopped at step 2"]


def test_the_second_one_does_not_wait(image_folder: Path, tmp_path: Path) -> None:
    """The last checkpoint is then that of before."""
    run = tmp_path / "run"
    with pytest.raises(Stopped, match=r"^stopped; train\(resume=.* continues from the last checkpoint$"):
        train(config(image_folder), run, local=True, progress=False, loggers=[Presses(3, times=2)])
    assert last_step(run) == 2


def test_before_the_first_step_nothing_is_left(image_folder: Path, tmp_path: Path) -> None:
    """There is nothing to save, and the same call works again. A resumed run keeps its folder."""
    run, settings = tmp_path / "run", config(image_folder, train={"steps": 2, "evaluate_every": 0})
    with pytest.raises(Stopped, match=r"^stopped before the first step$"):
        train(settings, run, local=True, progress=False, loggers=[PressesAtTheStart()])
    assert not run.exists()
    train(settings, run, local=True, progress=False)
    with pytest.raises(Stopped, match="continues from the last checkpoint"):
        train(resume=run, local=True, progress=False, loggers=[PressesAtTheStart()])
    assert last_step(run) == 2


def test_the_last_evaluation_is_left_out(image_folder: Path, tmp_path: Path) -> None:
    """After the last checkpoint no step follows, and the run waits for nothing."""
    run = tmp_path / "run"
    settings = config(image_folder, train={"steps": 2, "evaluate_every": 0}, checkpoint={"every_steps": 0})
    with pytest.raises(Stopped, match="continues from the last checkpoint"):
        train(settings, run, local=True, progress=False, loggers=[Presses(2)])
    assert last_step(run) == 2 and RunDir(run).results() is None


def test_a_handler_of_the_program_is_left_alone(image_folder: Path, tmp_path: Path) -> None:
    """It gets the signal, and the run goes on. should_stop ends a run as before."""
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    settings = config(image_folder, train={"steps": 2, "evaluate_every": 0})
    train(settings, tmp_path / "run", local=True, progress=False, loggers=[Presses(1)])
    assert received == [signal.SIGINT]
    with pytest.raises(Interrupted, match="stopped at step 0"):
        train(settings, tmp_path / "other", local=True, progress=False, should_stop=lambda: True)


def test_train_works_in_another_thread(image_folder: Path, tmp_path: Path) -> None:
    """Python allows no handlers there."""
    settings = config(image_folder, train={"steps": 1, "evaluate_every": 0})
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(train, settings, tmp_path / "run", local=True, progress=False).result()
    assert results["step"] == 1
