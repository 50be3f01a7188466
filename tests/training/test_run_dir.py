"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_dmml.training.run_dir import RunDir


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "3", '"x"'])
def test_a_missing_or_damaged_environment_is_empty(tmp_path: Path, text: str | None) -> None:
    """A run is resumed and evaluated without it."""
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert RunDir(tmp_path).environment() == {}
