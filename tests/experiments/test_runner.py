"""What the experiments share: the files of rows, and tasks side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPERIMENTS

from ray_dmml.errors import UserError


@pytest.fixture(autouse=True)
def experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)


def test_a_line_that_is_not_a_row_is_named(tmp_path: Path) -> None:
    """A last line that a killed process left incomplete is removed. One process at a time has the file."""
    from runner.rows import open_rows

    file = tmp_path / "rows.jsonl"
    file.write_text('{"seed": 0}\n<<<<\n{"seed": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is not a row: b'<<<<"), open_rows(file):
        pass
    file.write_text('{"seed": 0}\n{"se')
    with open_rows(file) as (rows, add):
        with pytest.raises(UserError, match="written by another run"), open_rows(file):
            pass
        add({"seed": 1})
    assert rows == [{"seed": 0}]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"seed": 0}, {"seed": 1}]


def test_tasks_wait_for_those_that_they_need(
    private_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task reads what the one before it has left. One that fails stops only those that need it, and a run that was
    only made again for another one gives no second row."""
    from runner.tasks import Task, run_tasks

    def run(name: str, needs: str | None) -> dict[str, Any]:
        if name == "broken":
            raise ValueError("it is broken")
        (tmp_path / name).write_text((tmp_path / needs).read_text() + name if needs else name)
        return {"seconds": 1.0, "content": (tmp_path / name).read_text()}

    def task(name: str, needs: str | None = None, **more: Any) -> Task:
        return Task(name, {"arm": name}, (name, needs), needs, **more)

    tasks = [task("a", has_row=True), task("broken"), task("b", "a"), task("lost", "broken"), task("c", "b")]
    rows: list[dict[str, Any]] = []
    assert run_tasks(run, tasks, rows.append, lambda row: row["content"], workers=2) == 2
    assert [(row["arm"], row["content"]) for row in rows] == [("b", "ab"), ("c", "abc")]
    printed = capsys.readouterr().out
    assert "broken: ValueError: it is broken" in printed and "lost: not run, because it needs the run of bro" in printed
    assert "c: abc, 1 s; " in printed
