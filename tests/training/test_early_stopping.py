"""A run that ends when its validation figures do not improve any more."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import tiny
from test_runs import assert_same_run, figures, metrics

from ray_dmml import Config, UserError, evaluate, train
from ray_dmml.checkpoint.store import CheckpointStore
from ray_dmml.loggers.logger import Logger

STEPS, PATIENCE = 8, 2


class LastSteps(Logger):
    """The steps of which a checkpoint says that no step follows."""

    found: ClassVar[list[int]] = []

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if metrics.get("is_last"):
            self.found.append(step)


def settings(root: Path, patience: int | None, **changes: Any) -> Config:
    training = {"steps": STEPS, "evaluate_every": 1, "early_stopping": patience, "tensorboard": False}
    raw = tiny(root, train={**training, **changes}, checkpoint={"every_steps": 0})
    raw["cohort"]["peers"] = [{}]
    return Config.parse(raw)


@pytest.fixture(scope="module")
def full_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that makes all its steps; not to be written into."""
    out = tmp_path_factory.mktemp("early") / "full"
    train(settings(image_folder, None), out, local=True)
    return out


def best_and_end(run: Path) -> tuple[int, int]:
    """Of a whole run: the best step, and the first step with so many evaluations after it that are no better."""
    values = {row["step"]: row["validation"]["ensemble"]["recall@1"] for row in metrics(run) if "validation" in row}
    for end in range(PATIENCE + 1, STEPS):
        best = max(range(1, end + 1), key=lambda step: (values[step], -step))
        if end - best >= PATIENCE:
            return best, end
    raise AssertionError("the run improves to its end, and the test needs one that does not")


def test_a_run_ends_after_so_many_evaluations_that_are_no_better(
    full_run: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Interrupted or not, it is the first part of the whole run, and its best checkpoint is evaluated. Resumed it ends
    at once; resumed without early stopping it becomes the whole run."""
    best, end = best_and_end(full_run)
    run, store = tmp_path / "run", CheckpointStore(tmp_path / "run" / "checkpoints")
    train(settings(image_folder, PATIENCE, steps=end - 1), run, local=True)
    with caplog.at_level(logging.INFO, "ray_dmml"):
        results = train(settings(image_folder, PATIENCE), resume=run, local=True, loggers=[LastSteps()])
    assert LastSteps.found == [end]
    assert f"no better validation Recall@1 in {PATIENCE} evaluations since step {best}" in caplog.text
    assert f"training ends at step {end} of {STEPS}" in caplog.text
    assert (results["weights"], results["step"], results["stopped_early"]) == ("best", best, end)
    assert (store.load("best").step, store.load("last").step) == (best, end)
    assert (full_run / "metrics.jsonl").read_text().startswith((run / "metrics.jsonl").read_text())
    assert metrics(run)[-1]["step"] == end
    assert {**evaluate(run), "stopped_early": end} == figures(results)

    assert figures(train(resume=run, local=True)) == figures(results) and store.load("last").step == end
    train(settings(image_folder, None), resume=run, local=True)
    assert_same_run(run, full_run)
    assert "stopped_early" not in json.loads((run / "results.json").read_text())


def test_early_stopping_needs_evaluations(image_folder: Path) -> None:
    raw = tiny(image_folder, train={"early_stopping": 3})
    with pytest.raises(UserError, match=r"early_stopping needs validation classes.*data.validation_fraction is 0"):
        Config.parse({**raw, "data": {**raw["data"], "validation_fraction": 0}})
    with pytest.raises(UserError, match=r"early_stopping needs evaluations before the end.*evaluate_every is 0"):
        settings(image_folder, 3, evaluate_every=0)
