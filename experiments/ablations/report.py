"""Tables and a plot of an ablation's rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from .arms import Arm, Arms, Plan
from .candidates import STAGES

MIN_SEEDS = 3
"""Fewest seeds for an interval: two that agree by chance would look certain."""

Row = Mapping[str, Any]
Seeds = Mapping[int, Row]
"""The rows of one arm, by seed."""


def mean_peer(row: Row, metric: str = "recall@1") -> float:
    """Percent."""
    return 100 * float(np.mean([peer[metric] for peer in row["peers"]]))


def ensemble(row: Row, metric: str = "recall@1") -> float:
    """Percent."""
    return 100 * float(row["ensemble"][metric])


def both(row: Row) -> float:
    """The mean of mean peer and ensemble, by which candidates are chosen. Percent."""
    return (mean_peer(row) + ensemble(row)) / 2


COLUMNS: dict[str, Callable[[Row], float]] = {
    "mean peer R@1": mean_peer,
    "ensemble R@1": ensemble,
    "mean of both": both,
    "mean peer MAP@R": lambda row: mean_peer(row, "map@r"),
    "ensemble MAP@R": lambda row: ensemble(row, "map@r"),
    "agreement": lambda row: 100 * float(row["agreement"]),
}
COMPARED = {"mean peer": mean_peer, "ensemble": ensemble}


class Difference(NamedTuple):
    """The difference between two arms, seed by seed."""

    mean: float
    low: float
    """The 95 % interval of a paired t-test is ``low`` to ``high``; both are NaN below MIN_SEEDS."""

    high: float
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "-"
        interval = f" [{self.low:+.1f}, {self.high:+.1f}]" if self.seeds >= MIN_SEEDS else ""
        return f"{self.mean:+.1f}{interval}"


def paired(arm: Seeds, baseline: Seeds, who: Callable[[Row], float]) -> Difference:
    """``arm`` minus ``baseline``, over the seeds that both have."""
    seeds = sorted(arm.keys() & baseline.keys())
    differences = np.array([who(arm[seed]) - who(baseline[seed]) for seed in seeds])
    mean = float(differences.mean()) if seeds else float("nan")
    half = float("nan")
    if len(seeds) >= MIN_SEEDS:
        half = float(stats.t.ppf(0.975, len(seeds) - 1)) * float(stats.sem(differences))
    return Difference(mean, mean - half, mean + half, len(seeds))


class Results:
    """The rows of one file, by arm. Arms with the same settings have the same rows."""

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self._plan, self._rows = plan, defaultdict[str, dict[int, Row]](dict)
        for row in rows:
            self._rows[row["settings"]].setdefault(row["seed"], row)

    def of(self, arm: Arm) -> Seeds:
        return self._rows.get(self._plan.digest(arm), {})

    def finished(self, arms: Arms) -> dict[str, Seeds]:
        """The rows of the arms that have any."""
        return {name: found for name, arm in arms.items() if (found := self.of(arm))}

    def ranked(self, arms: Arms) -> list[str]:
        """Names, best first: those with most seeds, then by the mean of mean peer and ensemble."""
        found = self.finished(arms)

        def key(name: str) -> tuple[int, float]:
            return len(found[name]), float(np.mean([both(row) for row in found[name].values()]))

        return sorted(found, key=key, reverse=True)


def table(arms: Arms, results: Results, names: Sequence[str], baselines: Mapping[str, Callable[[Arm], Arm]]) -> str:
    """A Markdown table: means and standard deviations over seeds, and differences from baselines."""
    differences = [f"{who} − {baseline}" for baseline in baselines for who in COMPARED]
    columns = ["", "seeds", *COLUMNS, *differences]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in names:
        found = results.of(arms[name])
        cells = [name, str(len(found))]
        for figure in COLUMNS.values():
            values = [figure(row) for row in found.values()]
            cells.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""))
        for baseline in baselines.values():
            other = results.of(baseline(arms[name]))
            cells += ["" if other is found else str(paired(found, other, who)) for who in COMPARED.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def same_size(arm: Arm) -> Arm:
    """Independent peers with all diversities, as many as the arm has."""
    return Arm(diverse=True, num_peers=arm.num_peers)


def best(stage: str, arms: Arms, results: Results) -> str:
    """A sentence that names the best candidate of a stage."""
    name = results.ranked(arms)[0]
    found = results.of(arms[name])
    means = [f"{np.mean([who(row) for row in found.values()]):.1f}" for who in COMPARED.values()]
    return f"Best of stage {stage}: {name}, with {means[0]} (mean peer) and {means[1]} (ensemble), {len(found)} seeds."


def summary(arms: Arms, results: Results) -> list[str]:
    """A line for each arm, best first: its figures, and its differences from independent peers with all diversities."""
    lines = []
    for name in results.ranked(arms):
        found, other = results.of(arms[name]), results.of(same_size(arms[name]))
        means = " / ".join(f"{np.mean([who(row) for row in found.values()]):.1f}" for who in COMPARED.values())
        points = " / ".join(f"{paired(found, other, who).mean:+.1f}" for who in COMPARED.values())
        compared = f", {points} over independent + all" if other and other is not found else ""
        lines.append(f"{name}: {means} (mean peer / ensemble; {len(found)} seeds){compared}")
    return lines


def provenance(rows: Sequence[Row]) -> str:
    """How many rows there are, how long they took, on which devices, and which commits made them."""
    hours = sum(row["seconds"] for row in rows) / 3600
    devices, commits = (", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit"))
    return f"{len(rows)} rows, {hours:.1f} hours in total, on {devices}; commit {commits}"


def write_report(plan: Plan, tested: Sequence[Row], chosen: Sequence[Row], folder: Path) -> Path:
    """Writes `report.md` and `differences.png` into the folder; returns the page's path.

    Args:
        tested: rows of the arms, on test classes.
        chosen: rows of the candidates, on validation classes.
    """
    test, validation = Results(plan, tested), Results(plan, chosen)
    sections = [
        "# Results",
        "`python experiments/ablation.py` generates this page from `rows.jsonl` and `candidates.jsonl`.",
        "Percent, at the last step, mean ± standard deviation over seeds. Differences are points of Recall@1 with "
        "the 95 % interval of a paired t-test over seeds, each on its own: of twenty comparisons of equals, one "
        "interval lies off zero. Agreement is the correlation of the peers' matrices of cosines, times 100.",
    ]
    groups: dict[str, tuple[Arms, Results]] = {}
    if tested:
        groups["arms, test classes"] = plan.arms, test
        independent = {"independent": lambda arm: Arm(), "independent + all": same_size}
        tested_table = table(plan.arms, test, list(test.finished(plan.arms)), independent)
        sections += ["## Arms, on test classes", f"{provenance(tested)}.", tested_table]
    if chosen:
        sections += ["## Candidates, on held-out training classes", f"{provenance(chosen)}."]
    for stage, arms in plan.stages.items():
        names = validation.ranked(arms)
        if set(names) - set(plan.arms):  # independent peers belong to several stages
            groups[f"stage {stage}, validation classes"] = arms, validation
            ranking = table(arms, validation, names, {"independent + all, same M": same_size})
            sections += [f"### Stage {stage}: {STAGES[stage]}", best(stage, arms, validation), ranking]
    plot(groups).savefig(folder / "differences.png", dpi=110)
    page = folder / "report.md"
    page.write_text("\n\n".join([*sections, "![Differences from independent peers](differences.png)"]) + "\n")
    return page


def plot(groups: Mapping[str, tuple[Arms, Results]]) -> Figure:
    """Each arm's differences from plain independent peers, in a panel for the mean peer and one for the ensemble."""
    lines: list[tuple[str, Arm | None, Results]] = []
    for title, (arms, results) in groups.items():
        lines.append((title, None, results))
        lines += [(name, arms[name], results) for name in results.ranked(arms) if arms[name] != Arm()]
    figure = Figure(figsize=(11, 0.24 * len(lines) + 1.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, who) in zip(panels, COMPARED.items(), strict=True):
        axes.set_title(f"{title}: Recall@1 minus that of independent peers, points", fontsize=10)
        axes.axvline(0, color="#888", lw=0.8)
        axes.grid(axis="x", color="#eee")
        for y, (_, arm, results) in enumerate(lines):
            if arm is not None:
                _plot_difference(axes, y, paired(results.of(arm), results.of(Arm()), who), bool(arm.settings))
    panels[0].set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=8)
    for label, (_, arm, _) in zip(panels[0].get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if arm else "bold")
    panels[0].invert_yaxis()
    figure.supxlabel("blue: peers learn from each other; grey: from labels alone; bars: 95 % interval", fontsize=9)
    return figure


def _plot_difference(axes: Axes, y: int, found: Difference, mutual: bool) -> None:
    colour = "#2563a8" if mutual else "#8a929c"
    if found.seeds:
        axes.plot(found.mean, y, "o", color=colour, markersize=5)
    if found.seeds >= MIN_SEEDS:
        axes.hlines(y, found.low, found.high, color=colour, lw=1.2)
