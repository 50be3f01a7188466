"""The tables of results: which figure and which interval stands where."""

from __future__ import annotations

import numpy as np
from report_samples import evaluation_of

from ray_dmml.report.results import results_tables, verification_table


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


def test_thresholds_of_every_run_and_system() -> None:
    """With their intervals, and the numbers of pairs once, or for each run if they differ."""
    rng = np.random.default_rng(0)
    summaries = [
        evaluation_of(labels, *(rng.normal(size=(len(labels), 8)) for _ in range(2))).summary()
        for labels in ([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2])
    ]
    table, note = verification_table(["a", "b"], summaries)
    assert table is not None
    assert [row.name for row in table.rows] == [f"{run}: {of}" for run in "ab" for of in ("peer0", "peer1", "ensemble")]
    assert "a: 6 pairs of one class and 24 of two classes; b: 18 pairs of one class and 54 of two classes." in note
    figures = summaries[1]["verification"]["ensemble"]
    row = dict(zip(table.head[1:], table.rows[-1].cells, strict=True))
    low, high = figures["intervals"]["threshold@0.01"]
    assert row["threshold at FMR 1 %"].text == f"{figures['threshold@0.01']:.3f}"
    assert row["threshold at FMR 1 %"].note == f"{low:.3f} – {high:.3f}"
    assert row["FNMR at FMR 0.1 %"].text == f"{100 * figures['fnmr@0.001']:.1f} %"

    table, note = verification_table(["a"], summaries[:1])
    assert table is not None and [row.name for row in table.rows] == ["peer0", "peer1", "ensemble"]
    assert "There are 6 pairs of one class and 24 of two classes." in note
    assert verification_table(["a"], [{**summaries[0], "verification": {"peer0": {}}}]) == (None, "")
