"""The tables of results: which figure and which interval stands where."""

from __future__ import annotations

import numpy as np
from report_samples import evaluation_of

from ray_dmml.report.results import results_tables


def test_means_over_queries_and_over_classes_have_their_own_intervals() -> None:
    """They differ where classes have different sizes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), np.arange(3, 9))
    peers = [rng.normal(size=(6, 8))[labels] + rng.normal(size=(len(labels), 8)) for _ in range(2)]
    results = {
        **{"untrained": {}, "untrained_ensemble": {}, "frozen_backbones": {}, "split": "test", "split_by": "class"},
        **{"num_images": len(labels), "num_classes": 6, "num_queries": None, "init_from": None},
        **evaluation_of(labels.tolist(), *peers).summary(),
    }
    means, tables, _ = results_tables(["run"], [results])
    _, (title, macro) = tables
    assert means is not None and title.startswith("Means over classes")
    for table, figures, intervals in (
        (means, results, results["intervals"]),
        (macro, results["macro"], results["macro_intervals"]),
    ):
        rows = {row.name: row.cells[0] for row in table.rows}
        assert list(rows) == ["peer0", "peer1", "ensemble"]
        for name, cell in rows.items():
            low, high = (intervals["peers"] | intervals)[name]["recall@1"]
            assert cell.text == f"{100 * (figures['peers'] | figures)[name]['recall@1']:.1f}"
            assert cell.note == f"{100 * low:.1f} – {100 * high:.1f}"
    assert means.rows[-1].cells[0] != macro.rows[-1].cells[0]


def test_a_table_has_no_rows_without_figures() -> None:
    """Untrained peers and frozen backbones have Recall@1 and MAP@R only, and no place in a table of other metrics."""
    labels = [0, 0, 1, 1, 2, 2]
    trained = evaluation_of(labels, np.random.default_rng(0).normal(size=(6, 8))).summary()
    before = {"recall@1": 0.25}
    results = {
        **{"untrained": {"peer0": before}, "untrained_ensemble": before, "frozen_backbones": {"peer0": before}},
        **{"split": "test", "split_by": "class", "num_images": 6, "num_classes": 3, "num_queries": None},
        **{"init_from": None, **trained},
    }
    means, [(title, further), *_], _ = results_tables(["run"], [results])
    assert means is not None and len(means.rows) == 3
    assert title == "Further metrics" and [row.name for row in further.rows] == ["peer0"]
