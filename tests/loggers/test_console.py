"""What a person sees of a run, on a terminal and in a pipe."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from ray_dmml.config.schema import Config
from ray_dmml.loggers.console import show_run

FIGURES = {"peers": {"peer0": {"recall@1": 0.25}, "peer1": {"recall@1": 0.5}}, "ensemble": {"recall@1": 0.75}}
UNTRAINED = {
    "split": "test",
    "peers": {"peer0": {"recall@1": 0.125}, "peer1": {"recall@1": 0.987}},
    "ensemble": {"recall@1": 0.982},
    "backbones": {"peer0": {"recall@1": 0.625}, "peer1": {"recall@1": 0.375}},
}
TERMS = {"loss": 1.5, "metric": 0.5, "distance": 0.25, "angle": 0.125}


def run(console: Console) -> None:
    """A run of 10 steps, of which peer1 learns from none."""
    log = logging.getLogger("ray_dmml.some.module")
    with show_run(console, Config.parse({"train": {"steps": 10}})) as logger:
        log.info("data      characters")
        log.debug("training")
        logger.rewind(0)
        logger.log({"untrained": UNTRAINED}, 0)
        log.debug("training")
        logger.log({}, 10)
        logger.log({"peers": {"peer0": TERMS, "peer1": {}}}, 9)
        logger.log({"peers": {"peer0": {}, "peer1": {}}}, 10)
        logger.log({"images_per_second": 64.25, "step_s": 80.0}, 8)
        logger.log({"images_per_second": 64.25, "step_s": 80.0}, 10)
        log.warning("the disk is full; training goes on")
        logger.log({"validation": FIGURES}, 10)
        logger.log({"checkpoint": "best"}, 10)
    log.warning("not shown: the run has ended")


def test_lines_in_a_pipe() -> None:
    """Each is one line, however narrow the console; an activity is one only the first time."""
    text = io.StringIO()
    run(Console(file=text, width=20))
    assert text.getvalue().splitlines() == [
        "data      characters",
        "training ...",
        "step 0  Recall@1 on test classes, untrained: peer0 0.125  peer1 0.987  ensemble 0.982",
        "step 0  Recall@1 on test classes, frozen backbone: peer0 0.625  peer1 0.375",
        "step 8/10  peer0 loss 1.5000 metric 0.5000 distance 0.2500 angle 0.1250  64.2 images/s  3 min left",
        "step 10/10  peer0 loss 1.5000 metric 0.5000 distance 0.2500 angle 0.1250  64.2 images/s",
        "warning: the disk is full; training goes on",
        "step 10  Recall@1 on validation classes: peer0 0.250  peer1 0.500  ensemble 0.750",
        "step 10  checkpoint saved, the best so far",
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_a_table_and_a_bar_on_a_terminal(width: int) -> None:
    """The last frame has the latest terms and the last evaluation of each peer; it fits the width."""
    text = io.StringIO()
    run(Console(file=text, width=width, force_terminal=True, color_system=None, legacy_windows=False))
    lines = text.getvalue().splitlines()
    assert all(len(line) <= width + 20 for line in lines)  # with escape sequences
    last = lines[-6:]
    assert any("peer0" in line and "1.5000" in line and "25.0 %" in line for line in last)
    assert any("peer1" in line and "50.0 %" in line for line in last)
    assert any("ensemble" in line and "75.0 %" in line for line in last)
    assert any("Recall@1 (validation, step 10)" in line for line in last)
    assert any("training" in line and "10/10" in line and "64 images/s" in line for line in last)
    assert "warning: the disk is full; training goes on" in text.getvalue()
    assert "not shown" not in text.getvalue()


def test_figures_of_test_classes_are_never_in_the_column_of_validation_classes() -> None:
    """On a terminal they are a line, as every evaluation; the column is of validation classes, or there is none."""
    for fraction, column in ((0.2, True), (0, False)):
        text = io.StringIO()
        console = Console(file=text, width=100, force_terminal=True, color_system=None, legacy_windows=False)
        config = Config.parse({"train": {"steps": 10}, "data": {"validation_fraction": fraction}})
        with show_run(console, config) as logger:
            logger.rewind(0)
            logger.log({"untrained": UNTRAINED}, 0)
            logger.log({}, 1)
        lines = text.getvalue().splitlines()
        [line] = [line for line in lines if "Recall@1 on test classes, untrained" in line]
        assert "peer1 0.987" in line
        assert not any("98.7" in line for line in lines)
        assert any("Recall@1 (validation)" in line for line in lines) == column


def test_every_evaluation_stays_on_the_terminal() -> None:
    """The live table shows the latest one; each is also a line above it."""
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, color_system=None, legacy_windows=False)
    with show_run(console, Config.parse({"train": {"steps": 10}})) as logger:
        logger.rewind(0)
        for step in range(1, 4):
            logger.log({"validation": FIGURES}, step)
    for step in range(1, 4):
        assert f"step {step}  Recall@1 on validation classes: peer0 0.250" in text.getvalue()


def test_logging_is_as_before_afterwards() -> None:
    package = logging.getLogger("ray_dmml")
    before: Any = (package.level, package.propagate, list(package.handlers))
    run(Console(file=io.StringIO()))
    assert (package.level, package.propagate, list(package.handlers)) == before
