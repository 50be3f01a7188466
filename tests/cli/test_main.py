"""The command itself."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from importlib import metadata

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.cli.output import show_log
from ray_dmml.config.schema import Config
from ray_dmml.loggers.console import show_run


def test_the_version() -> None:
    ended = CliRunner().invoke(app, ["--version"])
    assert ended.exit_code == 0
    assert ended.stdout == f"ray-dmml {metadata.version('ray-dmml')}\n"


@pytest.mark.ray
def test_the_package_is_the_command() -> None:
    """`python -m ray_dmml.cli` lists the commands."""
    line = [sys.executable, "-m", "ray_dmml.cli", "--help"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    for name in ("train", "evaluate", "tune", "config", "data"):
        assert f" {name} " in shown


@pytest.mark.parametrize("command", ["train", "evaluate", "tune", "data check", "data fetch"])
def test_every_option_has_a_help_text(command: str) -> None:
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command.split(), "--help"])
    assert ended.exit_code == 0
    rows = [row for row in ended.stdout.splitlines() if "  --" in row or row.startswith("│ --")]
    assert not re.search("<[a-z ]+>", "".join(rows))  # types are words of ours, such as FILE
    assert rows and all(row.strip("│ ").rsplit("  ", 1)[-1].endswith((".", "-")) for row in rows)


def test_the_log_of_the_package_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Sentences worth knowing and warnings; no details, and nothing after the block."""
    logger = logging.getLogger("ray_dmml.tune.tuner")
    with show_log(Console(width=20)):
        logger.debug("reading the images")
        logger.info("trials 0, 2 are equally [good]")
        logger.warning("%s failed", "a final run")
        with show_run(Console(width=20), Config()):
            logger.info("said once")
    logger.warning("later")
    assert capsys.readouterr().out == ("trials 0, 2 are equally [good]\nwarning: a final run failed\nsaid once\n")
