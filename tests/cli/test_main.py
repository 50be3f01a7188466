"""The command itself."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ray-dmml tr", {"train"}),
        ("ray-dmml data ", {"check", "fetch"}),
        ("ray-dmml train --re", {"--resume"}),
        ("ray-dmml evaluate --weights ", {"last", "best", "ema"}),
    ],
)
def test_a_shell_completes_commands_and_options(line: str, words: set[str]) -> None:
    """As bash asks for it: the words so far, and the number of the one to complete."""
    variables = {"_RAY_DMML_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    ended = CliRunner(env=variables).invoke(app, prog_name="ray-dmml")
    assert ended.exit_code == 0 and not ended.stderr
    assert set(ended.stdout.split()) == words


@pytest.mark.ray
def test_the_package_is_the_command() -> None:
    """`python -m ray_dmml.cli` lists the commands."""
    line = [sys.executable, "-m", "ray_dmml.cli", "--help"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    commands = (
        "train",
        "evaluate",
        "report",
        "embed",
        "index",
        "search",
        "export",
        "push",
        "tune",
        "distill",
        "config",
        "data",
        "compare",
        "views",
        "doctor",
    )
    for name in commands:
        assert f" {name} " in shown


@pytest.mark.parametrize(
    "command",
    [
        *("train", "evaluate", "report", "compare", "embed", "index", "search", "export", "push", "tune", "distill"),
        *("views", "doctor", "config"),
        *("data check", "data fetch"),
    ],
)
def test_every_option_has_a_help_text(command: str) -> None:
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command.split(), "--help"])
    assert ended.exit_code == 0
    rows = [row for row in ended.stdout.splitlines() if "  --" in row or row.startswith("│ --")]
    assert not re.search("<[a-z ]+>", "".join(rows))  # types are words of ours, such as FILE
    assert rows and all(
        row.strip("│ ").removesuffix(" [required]").rsplit("  ", 1)[-1].endswith((".", "-")) for row in rows
    )


def test_the_log_of_the_package_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Sentences worth knowing and warnings; what takes the time, once; and nothing after the block."""
    logger = logging.getLogger("ray_dmml.tune.tuner")
    with show_log(Console(width=20)):
        logger.debug("reading the images")
        logger.debug("reading the images")
        logger.info("trials 0, 2 are equally [good]")
        logger.warning("%s failed", "a final run")
        with show_run(Console(width=20), Config()):
            logger.info("said once")
    logger.warning("later")
    sentences = ["reading the images ...", "trials 0, 2 are equally [good]", "warning: a final run failed", "said once"]
    assert capsys.readouterr().out.splitlines() == sentences


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--out", ""),
        ("train", "--resume", ""),
        ("train", "--init-from", ""),
        ("train", "--config", ""),
        ("train", "--set", 'data.root=""'),
        ("train", "--set", 'checkpoint.storage_path=""'),
        ("train", "--set", 'cohort.base.weights=""'),
        ("tune", "--out", ""),
        ("tune", "--space", ""),
        ("evaluate", ""),
        ("compare", "run", ""),
        ("views", ""),
        ("views", "--out", ""),
        ("push", "", "a/b"),
        ("push", "run", "a/b", "--out", ""),
        ("index", ""),
        ("index", "DIR", "--out", ""),
        ("search", ""),
        ("search", "DIR", ""),
        ("search", "DIR", "IMAGE", "--html", ""),
    ],
)
def test_an_empty_path_is_refused(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is often an unset variable of a shell, and Python would read it as the current folder."""
    monkeypatch.chdir(tmp_path)
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments])
    assert ended.exit_code == 2 and "path is empty" in ended.stderr, ended.output
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_characters_that_a_terminal_does_not_have(tmp_path: Path) -> None:
    """They are printed as escapes. A command never fails for them."""
    config = tmp_path / "c.yaml"
    config.write_text("data: {name: imagefolder, root: /Bücher/写真}\n", encoding="utf-8")
    for encoding in ("ascii", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        command = [
            sys.executable,
            "-m",
            "ray_dmml.cli",
            "train",
            "--config",
            str(config),
            "--out",
            str(tmp_path / "run"),
        ]
        ended = subprocess.run(command, capture_output=True, env=environment)
        printed = ended.stderr.decode(encoding)
        assert ended.returncode == 2 and printed.startswith("error: data.root /B") and printed.count("\n") == 1
        command[3:] = ["config", "--config", str(config)]
        ended = subprocess.run(command, capture_output=True, env=environment)
        assert ended.returncode == 0 and not ended.stderr
