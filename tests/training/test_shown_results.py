"""What train() and evaluate() return."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import tiny

from ray_dmml import evaluate, train
from ray_dmml.config.schema import Config


def test_a_notebook_shows_tables(image_folder: Path, tmp_path: Path) -> None:
    """The results are a dictionary, of which a notebook shows the tables that the commands print."""
    config = Config.parse(tiny(image_folder, train={"steps": 2}))
    trained = train(config, tmp_path / "run", local=True, progress=False)
    assert json.loads(json.dumps(trained)) == json.loads((tmp_path / "run" / "results.json").read_text())
    assert [note.partition(":")[0] for note in trained["notes"]] == ["validation Recall@1 is coarse"]
    again = evaluate(tmp_path / "run", subsets=True)
    for results, has_subsets in ((trained, False), (again, True)):
        shown = results._repr_mimebundle_()  # type: ignore[attr-defined]
        for text in shown.values():
            assert f"{100 * results['ensemble']['recall@1']:.1f}" in text
            assert ("peer0 + peer1" in text) == has_subsets
        assert "<pre" in shown["text/html"]
