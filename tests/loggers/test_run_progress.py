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


@contextmanager
def logging_to(*handlers: logging.Handler) -> Iterator[None]:
    """A program that has set up Python's logging so, or not at all; pytest has."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, list(handlers)
    try:
        yield
    finally:
        root.handlers = before


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
        train(config, tmp_path / "quiet", local=True, progress=False)
        logging.getLogger("ray_dmml").info("later")
    assert [line for line in lines_of(capsys) if "is coarse" not in line] == []  # Python itself prints warnings


def test_sentences_go_where_the_program_wants_them(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that has set up logging gets each sentence once, and its level is left as it is."""
    text = io.StringIO()
    raw = tiny(image_folder, train={"steps": 2})
    raw["cohort"]["base"]["batch_norm"] = "frozen"
    with logging_to(logging.StreamHandler(text)):
        train(Config.parse(raw), tmp_path / "run", local=True)
    lines = lines_of(capsys)
    assert lines and all(line.startswith("step ") for line in lines)
    assert text.getvalue().count("peer0 starts from random weights") == 1
    assert "data      imagefolder" not in text.getvalue()  # the root's level is WARNING


def test_a_standard_error_that_cannot_be_written(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is worth no run: neither a full disk behind it, nor that it is closed."""
    config = Config.parse(tiny(image_folder, train={"steps": 1}))

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for number, stream in enumerate((Full(), closed)):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            assert train(config, tmp_path / str(number), local=True)["step"] == 1
