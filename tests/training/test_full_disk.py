"""A disk that is full for some time."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from ray_dmml.config.schema import Config
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir


@contextmanager
def restored_limit() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def config(image_folder: Path) -> Config:
    raw = tiny(
        image_folder,
        train={"steps": 12, "evaluate_every": 8, "log_every": 2},
        checkpoint={"every_steps": 4},
        evaluation={"recall_at": [1], "untrained": False},
    )
    return Config.parse(raw)


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config, out, local=True)
    return RunDir(out)


@pytest.mark.parametrize(
    ("full", "warnings"),
    [
        (600, ["metrics.jsonl cannot be written", "the rows are kept until they can be written"]),
        (20_000, ["checkpoint of step 8 cannot be written: [Errno 27] File too large; training goes on"]),
    ],
)
def test_nothing_is_missing_or_there_twice_afterwards(
    full: int,
    warnings: list[str],
    config: Config,
    undisturbed: RunDir,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Checkpoints and metrics that find no room are warned of, and training goes on. Here a limit on the size
    of files, in bytes, stands for the disk: metrics find no room, or checkpoints alone."""
    with restored_limit() as hard:

        class FullFromStep6To11(Logger):
            def log(self, metrics: Mapping[str, Any], step: int) -> None:
                if not metrics and step == 6:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard))
                if not metrics and step == 11:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        with caplog.at_level(logging.WARNING, "ray_dmml"):
            train(config, tmp_path / "run", loggers=[FullFromStep6To11()], local=True)
    assert [warning for warning in (*warnings, "training goes on") if warning not in caplog.text] == []
    run = RunDir(tmp_path / "run")
    assert run.metrics_file.read_text() == undisturbed.metrics_file.read_text()
    peers = [each.checkpoints.load("last").peers for each in (run, undisturbed)]
    assert peers[0] == peers[1]
