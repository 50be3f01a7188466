"""What a script or a notebook shows of a run that it trains."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import tiny

from ray_dmml import Config, train
from ray_dmml.loggers.progress import show_progress


@contextmanager
def logging_to(*handlers: logging.Handler) -> Iterator[None]:
    """A program that has set up Python's logging so, or not at all; pytest has."""
    root, package = logging.getLogger(), logging.getLogger("ray_dmml")
    before, root.handlers = root.handlers, list(handlers)
    levels = root.level, package.level
    root.setLevel(logging.WARNING)
    package.setLevel(logging.NOTSET)
    try:
        yield
    finally:
        root.handlers = before
        root.setLevel(levels[0])
        package.setLevel(levels[1])


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = capsys.readouterr()
    assert shown.out == ""  # it belongs to the program
    return shown.err.splitlines()


def test_train_prints_lines(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sentences, losses, evaluations and checkpoints, by default; nothing if that is not wanted, and nothing later."""
    config = Config.parse(tiny(image_folder, train={"steps": 2}))
    with logging_to():
        train(config, tmp_path / "run", local=True)
    lines = lines_of(capsys)
    assert any(line.startswith("data      imagefolder: train 30 images") for line in lines)
    assert any(line.startswith("step 2/2  peer0 loss ") and line.endswith("images/s") for line in lines)
    assert any(line.startswith("step 2  Recall@1 on validation classes: peer0 ") for line in lines)
    assert any(line.startswith("step 2  checkpoint saved") for line in lines)
    with logging_to():
        train(resume=tmp_path / "run", local=True, progress=False)
        logging.getLogger("ray_dmml").info("later")
    warnings = ("is coarse", "seem to have collapsed", "Recall@1 is 100 %")  # which Python itself prints
    assert [line for line in lines_of(capsys) if not any(text in line for text in warnings)] == []


def test_sentences_go_where_the_program_wants_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that has set up logging gets each sentence once, and its level is left as it is."""
    text, log = io.StringIO(), logging.getLogger("ray_dmml.some.module")
    with logging_to(logging.StreamHandler(text)), show_progress(Config()) as logger:
        log.warning("the disk is full")
        log.info("recovered")  # the root's level is WARNING
        logger.log({"checkpoint": "last"}, 1)
    assert lines_of(capsys) == ["step 1  checkpoint saved"]
    assert text.getvalue().splitlines() == ["the disk is full"]
    with logging_to(), show_progress(Config()):
        log.warning("the disk is full")
        log.info("recovered")
    assert lines_of(capsys) == ["warning: the disk is full", "recovered"]


def test_a_standard_error_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is worth no run: neither a full disk behind it, nor that it is closed."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            with logging_to(), show_progress(Config()) as logger:
                logging.getLogger("ray_dmml").warning("the disk is full")
                logger.log({"checkpoint": "last"}, 1)
