"""examples/quickstart: its two files are one notebook, and it runs."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


def cells_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_both_files_are_the_same_notebook() -> None:
    """The Markdown is edited, and `jupytext --to ipynb examples/quickstart.md` makes the notebook, without outputs."""
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert cells_of(notebook) == cells_of(jupytext.read(EXAMPLES / "quickstart.md"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.ray
def test_it_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, shows the results and a picture of neighbours, and ends with the intervals of a comparison."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for its runs
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = {cell.source.splitlines()[0]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    [picture] = outputs['draw_neighbors(runs / "mutual", num_queries=6)']
    assert "image/png" in picture["data"]
    trained = outputs['results = train(config, runs / "mutual", local=True)']
    [live] = [output for output in trained if output.output_type == "display_data"]
    assert "60/60" in live["data"]["text/plain"]
    [table] = outputs["results"]
    assert "ensemble" in table["data"]["text/plain"] and "┃" in table["data"]["text/html"]
    [compared] = outputs['comparison = compare([runs / "independent", runs / "mutual"])["comparisons"][0]']
    assert re.search(r"^ensemble +[+-][\d.]+ points, 95 % interval [+-][\d.]+ to [+-][\d.]+$", compared["text"], re.M)
    (temporary,) = tmp_path.glob("quickstart-*")
    assert {run.name for run in temporary.iterdir()} == {"mutual", "independent"}
