"""Loggers of one's own, by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_dmml.config.code import read_code, use_code
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.loggers.build import build_loggers

OWN = """
from ray_dmml import Logger

class Steps(Logger):
    def __init__(self, config, folder, note=""):
        self.config, self.folder, self.note = config, folder, note

class Plain(Logger):
    pass

class Other:
    pass
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path) -> Iterator[None]:
    """The module own_loggers."""
    (tmp_path / "own_loggers.py").write_text(OWN)
    use_code(read_code([tmp_path / "own_loggers.py"]))
    yield
    use_code({})


def settings(*loggers: dict[str, Any]) -> Config:
    return Config.parse({"train": {"loggers": loggers}})


def test_loggers_by_name(tmp_path: Path) -> None:
    """The run's config and folder are filled in where they are required."""
    config = settings({"name": "own_loggers:Steps", "args": {"note": "a"}}, {"name": "own_loggers:Plain"})
    steps, plain = build_loggers(config, tmp_path)
    assert (steps.config, steps.folder, steps.note) == (config, tmp_path, "a")  # type: ignore[attr-defined]
    plain.log({}, 1)


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        (
            {"name": "own_loggers:Other"},
            r"train.loggers.0.name: own_loggers:Other must be a subclass of ray_dmml.Logger",
        ),
        ({"name": "own_loggers:Step"}, r"train.loggers.0.name 'own_loggers:Step': .*did you mean Steps"),
        ({"name": "own_loggers:Plain", "args": {"note": ""}}, r"own_loggers:Plain does not fit its args"),
    ],
)
def test_mistakes_are_named(logger: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build_loggers(settings(logger), tmp_path)
