"""metrics.jsonl: every row once, in order, whatever interrupts the run or fills the disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ray_dmml.errors import CheckpointError
from ray_dmml.loggers.jsonl import JsonlLogger


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_only_what_is_reproducible_is_written(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log({"peers": {"peer0": {"loss": 1.5}}}, 1)
    logger.log({"images_per_second": 3.0}, 1)
    logger.log({}, 2)
    logger.log({"validation": {"ensemble": {"recall@1": 0.5}}}, 1)
    logger.flush()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "peers": {"peer0": {"loss": 1.5}}},
        {"step": 1, "validation": {"ensemble": {"recall@1": 0.5}}},
    ]


def test_rewind_drops_later_rows_written_or_not(tmp_path: Path) -> None:
    """And a last line that was cut short; lines that are no JSON before the step stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nno JSON\n{"step": 2}\n{"step": 3}\n{"step": 4')
    logger = JsonlLogger(path)
    logger.rewind(9)
    assert path.read_text() == '{"step": 1}\nno JSON\n{"step": 2}\n{"step": 3}\n'
    logger.log({"peers": {}}, 4)
    logger.rewind(2)
    logger.log({"peers": {}}, 3)
    logger.flush()
    assert path.read_text() == '{"step": 1}\nno JSON\n{"step": 2}\n{"step": 3, "peers": {}}\n'


def test_rows_are_kept_until_they_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning for all attempts; write() itself raises."""
    path = tmp_path / "gone" / "metrics.jsonl"
    logger = JsonlLogger(path)
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        for step in (1, 2, 3):
            logger.log({"peers": {}}, step)
            logger.flush()
        with pytest.raises(CheckpointError, match="cannot be written"):
            logger.write(sync=True)
    assert len(caplog.records) == 1 and "are kept until" in caplog.text
    path.parent.mkdir()
    logger.write(sync=True)
    assert steps(path) == [1, 2, 3]
