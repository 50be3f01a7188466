"""Tables and a plot of an ablation's rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from runner.figures import Seeds, Value, paired, points

from .arms import Arm, Arms
from .candidates import STAGES
from .plan import Plan

Row = Mapping[str, Any]


def mean_peer(row: Row, metric: str = "recall@1") -> float:
    return 100 * float(np.mean([peer[metric] for peer in row["peers"]]))


def ensemble(row: Row, metric: str = "recall@1") -> float:
    return 100 * float(row["ensemble"][metric])


def both(row: Row) -> float:
    """The mean of mean peer and ensemble. The best candidate has the highest one."""
    return (mean_peer(row) + ensemble(row)) / 2


COLUMNS: dict[str, Value] = {
    "mean peer R@1": mean_peer,
    "ensemble R@1": ensemble,
    "mean of both": both,
    "mean peer MAP@R": lambda row: mean_peer(row, "map@r"),
    "ensemble MAP@R": lambda row: ensemble(row, "map@r"),
    "agreement": lambda row: 100 * float(row["agreement"]),
}
COMPARED: dict[str, Value] = {"mean peer": mean_peer, "ensemble": ensemble}
BASELINES: dict[str, Callable[[Arm], Arm]] = {
    "independent": lambda arm: Arm(),
    "independent + all, same M": lambda arm: Arm(diverse=True, num_peers=arm.num_peers),
}


class Results:
    """The rows of one file, by arm. Arms with the same settings have the same rows."""

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self._plan, self._rows = plan, defaultdict[str, dict[int, Row]](dict)
        for row in rows:
            self._rows[row["settings"]][row["seed"]] = row

    def of(self, arm: Arm) -> Seeds:
        return self._rows[self._plan.digest(arm)]

    def ranked(self, arms: Arms) -> list[str]:
        """The names of arms with rows, best first. Arms with fewer seeds come after the others."""
        found = {name: [both(row) for row in self.of(arm).values()] for name, arm in arms.items()}
        names = [name for name, values in found.items() if values]
        return sorted(names, key=lambda name: (len(found[name]), np.mean(found[name])), reverse=True)

    def describe(self, name: str, arm: Arm) -> str:
        """A line with an arm's figures, and its differences from independent peers with all diversities."""
        found, other = self.of(arm), self.of(BASELINES["independent + all, same M"](arm))
        means = [f"{np.mean([who(row) for row in found.values()]):.1f}" for who in COMPARED.values()]
        differences = [points(*paired(found, other, who)) for who in COMPARED.values()]
        compared = "" if other is found or not other else f"; {' / '.join(differences)} over independent + all"
        return f"{name}: {' / '.join(means)} (mean peer / ensemble, {len(found)} seeds){compared}"


def table(arms: Arms, results: Results) -> str:
    """A Markdown table: means and standard deviations over seeds, and differences from baselines."""
    columns = ["", "seeds", *COLUMNS, *(f"{who} − {baseline}" for baseline in BASELINES for who in COMPARED)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in results.ranked(arms):
        found = results.of(arms[name])
        cells = [name, str(len(found))]
        for figure in COLUMNS.values():
            values = [figure(row) for row in found.values()]
            cells.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""))
        for baseline in BASELINES.values():
            other = results.of(baseline(arms[name]))
            cells += ["" if other is found else points(*paired(found, other, who)) for who in COMPARED.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def provenance(rows: Sequence[Row]) -> str:
    hours = sum(row["seconds"] for row in rows) / 3600
    devices, commits = (", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit"))
    return f"{len(rows)} rows, {hours:.1f} hours in total, on {devices}; commit {commits}."


def write_report(plan: Plan, tested: Sequence[Row], chosen: Sequence[Row], folder: Path) -> Path:
    """Writes `report.md` and `differences.png` into the folder; returns the page's path.

    Args:
        tested: rows of the arms, on test classes.
        chosen: rows of the candidates, on validation classes.
    """
    sections = [
        "# Results",
        "`python experiments/ablation.py` generates this page from `rows.jsonl` and `candidates.jsonl`.",
        "Percent at the last step, mean ± standard deviation over seeds, best first. Differences are points of "
        "Recall@1 with the 95 % interval of a paired t-test over seeds, each on its own: of twenty comparisons of "
        "equals, one interval lies off zero. *Agreement* is the correlation of the peers' matrices of cosines.",
        "![Differences from independent peers](differences.png)",
    ]
    groups: dict[str, tuple[Arms, Results]] = {}
    if tested:
        groups["Arms, on test classes"] = plan.arms, Results(plan, tested)
        sections += ["## Arms, on test classes", provenance(tested), table(*groups["Arms, on test classes"])]
    if chosen:
        sections += ["## Candidates, on held-out training classes", provenance(chosen)]
    results, shown = Results(plan, chosen), set[str]()
    for stage, arms in plan.stages.items():
        names = results.ranked(arms)
        digests = {plan.digest(arms[name]) for name in names}
        if digests - shown:  # else it was not run, and all its rows belong to stages before it
            shown |= digests
            groups[f"Stage {stage}, on held-out training classes"] = arms, results
            best = f"Best: {results.describe(names[0], arms[names[0]])}."
            sections += [f"### Stage {stage}: {STAGES[stage]}", best, table(arms, results)]
    plot(groups).savefig(folder / "differences.png", dpi=110)
    page = folder / "report.md"
    page.write_text("\n\n".join(sections) + "\n")
    return page


def plot(groups: Mapping[str, tuple[Arms, Results]]) -> Figure:
    """Each arm's differences from independent peers, in a panel for the mean peer and one for the ensemble."""
    labels: list[str] = []
    arms: list[tuple[Arm, Results] | None] = []
    for title, (table, results) in groups.items():
        names = [name for name in results.ranked(table) if results.of(table[name]) is not results.of(Arm())]
        labels += [title, *names]
        arms += [None, *((table[name], results) for name in names)]
    figure = Figure(figsize=(11, 0.24 * len(labels) + 1.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, who) in zip(panels, COMPARED.items(), strict=True):
        for y, entry in enumerate(arms):
            if entry is not None:
                arm, results = entry
                mean, half = paired(results.of(arm), results.of(Arm()), who)
                axes.errorbar(mean, y, xerr=half, fmt="o", color="#2563a8" if arm.mutual else "#8a929c", ms=5)
        axes.set_title(f"{title}: points of Recall@1 over independent peers", fontsize=10)
        axes.axvline(0, color="#888", lw=0.8)
        axes.grid(axis="x", color="#eee")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    for label, entry in zip(panels[0].get_yticklabels(), arms, strict=True):
        label.set_fontweight("normal" if entry else "bold")
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel("blue: peers learn from each other; grey: from labels alone; bars: 95 % interval", fontsize=9)
    return figure
