"""Who may use the folder of a run, and what is removed from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny

from ray_dmml import Config, UserError, train
from ray_dmml.checkpoint.remote import RUN_FILES
from ray_dmml.errors import Interrupted
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.run_dir import RunDir


def test_all_that_a_run_writes_can_be_discarded(tmp_path: Path) -> None:
    """And no other file."""
    run = RunDir(tmp_path / "run")
    for name in (*RUN_FILES, "images.csv.gz.tmp", "checkpoints/index.json", "tensorboard/events"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    (run.path / "mine").touch()
    run.discard()
    assert [path.name for path in run.path.iterdir()] == ["mine"]
    (run.path / "mine").unlink()
    run.discard()
    assert not run.path.exists()


def test_loggers_know_a_new_folder_before_anything_is_in_it(image_folder: Path, tmp_path: Path) -> None:
    """A command that is interrupted from then on has something to remove."""
    out, found = tmp_path / "run", []

    class Stops(Logger):
        def rewind(self, step: int) -> None:
            found.extend([out.is_dir(), *out.iterdir()])
            raise Interrupted

    with pytest.raises(Interrupted):
        train(Config.parse(tiny(image_folder)), out, local=True, loggers=[Stops()])
    assert found == [True]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    """A name that is too long, a file, a path through a file, a folder with content; not one with leftovers."""
    (tmp_path / "file").touch()
    for name, message in (("x" * 300, "File name too long"), ("file", "already exists"), ("file/x", "Not a directory")):
        with pytest.raises(UserError, match=message):
            RunDir(tmp_path / name).ensure_empty()
    assert not RunDir(tmp_path / ("x" * 300)).exists()
    with pytest.raises(UserError, match="already exists"):
        RunDir(tmp_path).ensure_empty()
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "config.yaml.tmp").touch()
    RunDir(tmp_path / "left").ensure_empty()
    RunDir(tmp_path / "new").ensure_empty()


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "3", '"x"'])
def test_a_missing_or_damaged_environment_is_empty(tmp_path: Path, text: str | None) -> None:
    """A run is resumed and evaluated without it."""
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert RunDir(tmp_path).environment() == {}
