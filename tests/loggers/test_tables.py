"""Tables show whole figures on any terminal and in any file."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from ray_dmml.loggers.results_tables import results_table
from ray_dmml.loggers.tables import fitting, print_table

METRICS = ["recall@1", "recall@10", "recall@100", "recall@1000", "map@r", "r_precision"]
NAMES = ["resnet50_view-strong_interval-2", "b"]


def figures(start: int) -> dict[str, float]:
    """Figures that occur once each: 10.1 %, 10.2 %, ... The last one is 100 %."""
    values = [start / 100 + number / 1000 for number in range(1, len(METRICS))]
    return dict(zip(METRICS, [*values, 1.0], strict=True))


RESULTS: dict[str, Any] = {
    "num_images": 60502,
    "num_queries": None,
    "num_gallery": None,
    "num_classes": 11316,
    "split": "test",
    "split_by": "class",
    "weights": "best",
    "step": 4000,
    "init_from": None,
    "frozen_backbones": {name: figures(70 + 10 * place) for place, name in enumerate(NAMES)},
    "untrained": {name: figures(10 + 10 * place) for place, name in enumerate(NAMES)},
    "untrained_ensemble": figures(30),
    "peers": {name: figures(40 + 10 * place) for place, name in enumerate(NAMES)},
    "ensemble": figures(60),
}


@pytest.mark.parametrize("width", [10, 40, 60, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_figure_is_cut(width: int, encoding: str, terminal: bool) -> None:
    """Each figure is there once, and nothing is shortened, whatever the width and the characters of the terminal."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    results_table(RESULTS, Console(file=file, width=width, force_terminal=terminal, color_system=None))
    file.seek(0)
    text = file.read()
    printed = re.findall(r"\d+\.\d", text)
    rows = [figures(start) for start in (10, 20, 30, 40, 50, 60, 70, 80)]
    assert sorted(printed) == sorted(f"{100 * value:.1f}" for row in rows for value in row.values())
    assert "…" not in text and NAMES[0] in text
    if terminal and width >= 80:
        assert max(map(len, text.splitlines())) <= width


def test_a_wide_terminal_has_one_table() -> None:
    """A narrow one has the first column beside each group of the others."""
    table = Table("name", "a", "b", "c", title="title", box=None)
    table.add_row("first", "1.0", "2.0", "3.0")
    for width, names in ((80, 1), (14, 3)):
        file = io.StringIO()
        print_table(table, Console(file=file, width=width, force_terminal=True, color_system=None))
        assert file.getvalue().count("first") == names and file.getvalue().count("title") == 1


@pytest.mark.parametrize("width", range(24, 70, 5))
def test_a_live_table_leaves_columns_out(width: int) -> None:
    """Its first and its last column stay, and what is there is whole."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("peer", "loss", "metric", "distance", "angle", "Recall@1 (validation, step 10)"):
        table.add_column(name)
    table.add_row("peer0", "1.2345", "2.3456", "3.4567", "4.5678", "98.7 %")
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    console.print(fitting(table, console))
    figures = re.findall(r"[\d.]*\d\.\d+", file.getvalue())
    assert figures[-1] == "98.7" and set(figures[:-1]) <= {"1.2345", "2.3456", "3.4567", "4.5678"}
    assert len(figures) == 5 or width < 60
