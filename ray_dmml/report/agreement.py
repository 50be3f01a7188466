"""How much the peers agree: on which queries they find, and on which images they find for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ray_dmml.evaluation.evaluation import KINDS, agreement
from ray_dmml.evaluation.retrieval import Retrieval
from ray_dmml.report.curves import NamedMetrics
from ray_dmml.report.data import Cell, Chart, Line, Row, Table
from ray_dmml.report.gallery import Retrievals

NUM_COMPARED = 10
"""Nearest images of which the share that two peers have in common is taken."""


def agreement_table(retrievals: Retrievals, peers: Sequence[str]) -> Table | None:
    """A row for each pair of peers; None: there is one peer."""
    rows, num_queries = [], len(retrievals.queries)
    for one, other in combinations(peers, 2):
        (shares,) = agreement({name: retrievals.systems[name] for name in (one, other)}).values()
        cells = [Cell(f"{100 * shares[kind]:.1f} %", f"{round(shares[kind] * num_queries):,}") for kind in KINDS]
        overlap = overlap_of(retrievals.systems[one], retrievals.systems[other])
        rows.append(Row(f"{one}, {other}", (*cells, Cell(f"{100 * overlap:.1f} %"))))
    if not rows:
        return None
    head = (
        "pair",
        "both find",
        "only the first",
        "only the second",
        "neither",
        f"common in the {NUM_COMPARED} nearest",
    )
    return Table(head, tuple(rows))


def overlap_of(one: Retrieval, other: Retrieval) -> float:
    """The mean share of the NUM_COMPARED nearest images that two systems have in common."""
    first, second = one.neighbors[:, :NUM_COMPARED], other.neighbors[:, :NUM_COMPARED]
    common = total = 0
    for start in range(0, len(first), 4096):  # (q, 10, 10) at a time
        a, b = first[start : start + 4096], second[start : start + 4096]
        common += int(((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).sum())
        total += int((a >= 0).sum())
    return common / max(total, 1)


def agreement_charts(runs: Sequence[NamedMetrics]) -> tuple[Chart, ...]:
    """The share of validation queries that only one peer of a pair finds, and that neither finds. Both find the rest,
    mostly nearly all: a line of it would press the others onto the axis, so the note has its numbers."""
    charts: list[Chart] = []
    for run in runs:
        pairs = dict.fromkeys(pair for _, rows in run.metrics.agreement for pair in rows)
        for pair in pairs:
            one, other = pair.split("/")
            names = dict(
                zip(KINDS, ("both find", f"only {one} finds", f"only {other} finds", "neither finds"), strict=True)
            )
            series: dict[str, list[tuple[float, float]]] = {}
            for step, rows in run.metrics.agreement:
                for kind, share in rows.get(pair, {}).items():
                    series.setdefault(names[kind], []).append((step, 100 * share))
            both = series.pop(names["both"])
            lines = tuple(Line(kind, style, tuple(points)) for style, (kind, points) in enumerate(series.items()))
            title = f"{run.prefix}{pair.replace('/', ' and ')}"
            ends = dict((both[0], both[-1]))
            note = "both find " + ", ".join(f"{share:.1f} % at step {step:,}" for step, share in ends.items())
            charts.append(Chart(f"agreement-{len(charts)}", title, note, "%", lines, from_zero=True))
    return tuple(charts)
