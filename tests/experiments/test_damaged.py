"""Damaged files of every format: none ends the process that decodes it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import EXPERIMENTS

DAMAGED = EXPERIMENTS / "reliability" / "damaged.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("damaged", DAMAGED)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


damaged = load()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", damaged.KINDS)
def test_damaged_files_are_used_or_refused(form: str) -> None:
    """40 of each format, in this process. Some must be refused, or they were not damaged."""
    outcomes = [outcome for outcome, _ in damaged.decode_all(form, range(40))]
    assert len(outcomes) == 40 and outcomes.count("refused") >= 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", damaged.KINDS)
def test_the_files_are_good_before(form: str, tmp_path: Path) -> None:
    """Otherwise they would be refused for another reason."""
    for number, content in enumerate(damaged.good_files(form)):
        (tmp_path / str(number)).write_bytes(content)
        assert damaged.FileImages(tmp_path, [str(number)], 32).read(0).float().std() > 5


@pytest.mark.ray
@pytest.mark.slow
def test_many_damaged_files() -> None:
    """2,000 of each format, in processes of their own."""
    done = subprocess.run([sys.executable, DAMAGED, "--count", "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
