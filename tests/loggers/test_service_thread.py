"""What a run does with a service that works, fails or hangs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.loggers.logger import Logger, Loggers
from ray_dmml.loggers.service import MAX_WAITING_PICTURES, ServiceLogger, require_service


class Store(ServiceLogger):
    """A service in this process."""

    service = "json"  # a package that is installed
    close_s = 0.2

    def __init__(
        self, folder: Path, faults: Mapping[str, Exception | Event] | None = None, config: Config | None = None
    ) -> None:
        super().__init__(config or Config(), folder)
        self.faults, self.calls = dict(faults or {}), list[Any]()

    def call(self, name: str, *args: Any) -> None:
        fault = self.faults.pop(name, None)
        if isinstance(fault, Event):
            fault.wait(20)
        elif fault is not None:
            raise fault
        self.calls.append((name, *args))

    def open(self, run_id: str | None) -> str:
        self.call("open", run_id)
        return run_id or "abc"

    def send(self, values: Mapping[str, float], step: int) -> None:
        self.call("send", step, dict(values))

    def send_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        self.call("picture", step, name, picture.shape)

    def finish(self) -> None:
        self.call("finish", self.is_finished)


def speed(logger: ServiceLogger, step: int) -> None:
    logger.log({"images_per_second": float(step)}, step)


FIGURES = {"peers": {"peer0": {"recall@1": 0.25}}, "ensemble": {"recall@1": 0.5}}


def test_a_run_in_a_service(tmp_path: Path) -> None:
    logger = Store(tmp_path / "run")
    (tmp_path / "run").mkdir()
    logger.rewind(0)
    logger.log({"pictures": {"views": np.zeros((4, 6, 3), np.uint8)}}, 0)
    logger.log({}, 1)
    logger.log({"peers": {"peer0": {"loss": 0.5}}}, 1)
    speed(logger, 2)
    logger.log({"validation": FIGURES}, 2)
    logger.log({"final": FIGURES}, 2)
    logger.close()
    logger.close()
    recall = {"recall_at_1/peer0": 0.25, "recall_at_1/ensemble": 0.5}
    assert logger.calls == [
        ("open", None),
        ("picture", 0, "views", (4, 6, 3)),
        ("send", 2, {"loss/peer0": 0.5, "images_per_second": 2.0}),
        ("send", 2, {f"validation_{key}": value for key, value in recall.items()}),
        ("send", 2, {f"final_{key}": value for key, value in recall.items()}),
        ("finish", True),
    ]


def test_the_settings_of_a_service_have_no_secrets(tmp_path: Path) -> None:
    """Neither those of another service nor those in the URI of a bucket."""
    loggers = [{"name": "mlflow", "args": {"tracking_uri": "https://me:secret1@host"}}]
    storage = "s3://key:secret2@bucket/folder?session_token=secret3"
    config = Config.parse({"train": {"loggers": loggers, "steps": 7}, "checkpoint": {"storage_path": storage}})
    settings = Store(tmp_path, config=config).settings()
    assert settings["checkpoint"]["storage_path"] == "s3://bucket/folder" and settings["train"]["steps"] == 7
    assert "secret" not in json.dumps(settings)
    own = config.model_dump(mode="json")
    assert settings.keys() == own.keys() and own["train"].keys() - settings["train"].keys() == {"loggers"}


def test_pictures_do_not_wait_without_end(tmp_path: Path) -> None:
    """For a service that hangs: they would fill the memory."""
    hang = Event()
    logger = Store(tmp_path, {"open": hang})
    logger.rewind(0)
    for step in range(2 * MAX_WAITING_PICTURES):
        logger.log({"pictures": {"worst_queries": np.zeros((4, 6, 3), np.uint8)}}, step)
    speed(logger, 500)
    hang.set()
    logger.close_s = 20
    logger.close()
    kept = [call for call in logger.calls if call[0] == "picture"]
    assert MAX_WAITING_PICTURES <= len(kept) <= MAX_WAITING_PICTURES + 1
    assert ("send", 500, {"images_per_second": 500.0}) in logger.calls


def test_a_logger_that_raises_keeps_no_other_open(tmp_path: Path) -> None:
    class Broken(Logger):
        def close(self) -> None:
            raise OSError("the disk is gone")

    service = Store(tmp_path)
    loggers = Loggers([Broken(), service])
    loggers.rewind(0)
    loggers.log({"images_per_second": 7.0}, 2)
    with pytest.raises(OSError, match="the disk is gone"):
        loggers.close()
    assert [call[0] for call in service.calls] == ["open", "send", "finish"]


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases, for example, makes a folder ``wandb`` where a program runs."""
    (tmp_path / "no_such_service").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no_such_service needs the extra"):
        require_service("no_such_service", "train.loggers")


def test_steps_that_come_again_are_not_sent_again(tmp_path: Path) -> None:
    """After the loss of a peer, and in another process that resumes the run. It goes on in the same run of the
    service."""
    logger = Store(tmp_path)
    logger.rewind(0)
    for step in (2, 4):
        speed(logger, step)
    logger.rewind(2)
    speed(logger, 4)
    logger.log({"validation": FIGURES}, 4)
    speed(logger, 6)
    logger.close()
    assert [call[1] for call in logger.calls if call[0] == "send"] == [2, 4, 4, 6]
    assert logger.calls[-1] == ("finish", False)
    resumed = Store(tmp_path)
    resumed.rewind(4)
    for step in (6, 8):
        speed(resumed, step)
    resumed.close()
    assert resumed.calls[0] == ("open", "abc")
    assert [call[1] for call in resumed.calls if call[0] == "send"] == [8]
    assert json.loads((tmp_path / "loggers/json.json").read_text())["id"] == "abc"


@pytest.mark.parametrize("content", ["", "[]", '{"id": "../..", "sent": {}}', '{"id": 1, "sent": {}}'])
def test_a_damaged_file_begins_another_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "loggers").mkdir()
    (tmp_path / "loggers/json.json").write_text(content)
    logger = Store(tmp_path)
    logger.rewind(0)
    speed(logger, 2)
    logger.close()
    assert [call[0] for call in logger.calls] == ["open", "send", "finish"] and logger.calls[0][1] is None


@pytest.mark.parametrize("where", ["open", "send"])
def test_a_service_that_fails_is_one_warning(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And it gets what comes after that."""
    logger = Store(tmp_path, {where: OSError("no route to host"), "finish": OSError("no route to host")})
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        logger.rewind(0)
        for step in (2, 4):
            speed(logger, step)
        logger.close()
    assert [record.getMessage() for record in caplog.records] == [
        "json fails (OSError: no route to host); training goes on, and metrics.jsonl has what is missing there"
    ]
    assert [call[1] for call in logger.calls if call[0] == "send"] == [4]


@pytest.mark.parametrize("where", ["open", "send", "finish"])
def test_a_service_that_hangs_is_one_warning(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run neither waits for it nor collects rows without end."""
    hang = Event()
    logger = Store(tmp_path, {where: hang})
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        logger.rewind(0)
        for step in range(2500 if where != "finish" else 2):
            speed(logger, step)
        logger.close()
    hang.set()
    [record] = caplog.records
    assert record.getMessage().startswith("json ") and "training goes on" in record.getMessage()
