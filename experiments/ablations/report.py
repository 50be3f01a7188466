"""Tables and plots of an ablation's rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from .arms import ARMS, DIVERSITIES

BASELINE = "independent"
MIN_SEEDS = 3
"""Fewest seeds for an interval: two that agree by chance would look certain."""

TWO_DEVICES = " †"
"""Marks a difference between figures of two devices."""

CURVES = ("independent", "independent + all", "mutual", "mutual + all", "mutual + all + ema")
COLOURS = {
    "independent": "#8a929c",
    "mutual": "#2563a8",
    "other": "#d9822b",
}
TABLES = {
    "At the last step, on test classes": ("last", "test"),
    "At the step that was best on validation classes, on test classes": ("best", "test"),
    "At the last step, on validation classes": ("last", "validation"),
}
"""Title -> the step, and the classes that are evaluated."""

COLUMNS = (
    "arm",
    "seeds",
    "mean peer R@1",
    "best peer R@1",
    "ensemble R@1",
    "mean peer MAP@R",
    "ensemble MAP@R",
    f"mean peer R@1 − {BASELINE}",
    f"ensemble R@1 − {BASELINE}",
    "mean peer R@1 − same diversities, independent",
    "ensemble R@1 − same diversities, independent",
)

Row = Mapping[str, Any]
Arms = Mapping[str, Mapping[int, Row]]
"""Arm -> seed -> row."""


def mean_peer(row: Row, at: str, metric: str = "recall@1", classes: str = "test") -> float:
    """Percent."""
    return 100 * float(np.mean([peer[metric] for peer in row[at][classes]["peers"]]))


def best_peer(row: Row, at: str, metric: str = "recall@1", classes: str = "test") -> float:
    """Percent, of the peer with the best Recall@1 on validation classes."""
    figures = row[at]
    position = int(np.argmax([peer["recall@1"] for peer in figures["validation"]["peers"]]))
    return 100 * float(figures[classes]["peers"][position][metric])


def ensemble(row: Row, at: str, metric: str = "recall@1", classes: str = "test") -> float:
    """Percent."""
    return 100 * float(row[at][classes]["ensemble"][metric])


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


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """``arm`` minus ``baseline``, over the seeds (keys) that both have."""
    seeds = sorted(arm.keys() & baseline.keys())
    differences = np.array([arm[seed] - baseline[seed] for seed in seeds])
    mean = float(differences.mean()) if seeds else float("nan")
    half = float("nan")
    if len(seeds) >= MIN_SEEDS:
        half = float(stats.t.ppf(0.975, len(seeds) - 1)) * float(stats.sem(differences))
    return Difference(mean, mean - half, mean + half, len(seeds))


def by_arm(rows: Sequence[Row]) -> Arms:
    """The rows of each arm by seed, in the order of ARMS."""
    arms: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        arms[row["arm"]].setdefault(row["seed"], row)
    return {name: arms[name] for name in ARMS if name in arms}


def provenance(rows: Sequence[Row]) -> str:
    """How many rows there are, how long they took, on which devices, and which commits made them."""
    hours = sum(row["seconds"] for row in rows) / 3600
    num_copies = sum("same_as" in row for row in rows)
    devices = sorted({row.get("device", "an unknown device") for row in rows})
    commits = sorted({row["commit"] for row in rows})
    copied = f" and {num_copies} copies" if num_copies else ""
    return (
        f"{len(rows) - num_copies} rows{copied}, {hours:.1f} hours in total, on {', '.join(devices)}; "
        f"commit {', '.join(commits)}"
    )


def table(rows: Sequence[Row], at: str, classes: str = "test") -> str:
    """A Markdown table: means and standard deviations over seeds, and differences."""
    arms = by_arm(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, of_seed in arms.items():
        original = next((row["same_as"] for row in of_seed.values() if "same_as" in row), None)
        cells = [f"{name} (same settings as {original})" if original else name, str(len(of_seed))]
        for who, metric in (
            (mean_peer, "recall@1"),
            (best_peer, "recall@1"),
            (ensemble, "recall@1"),
            (mean_peer, "map@r"),
            (ensemble, "map@r"),
        ):
            values = [who(row, at, metric, classes) for row in of_seed.values()]
            deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{deviation}")
        counterpart = name.replace("mutual", BASELINE).removesuffix(", unit length")
        for other in (BASELINE, counterpart):
            baseline = arms.get(other, {})
            for who in (mean_peer, ensemble):
                mine, theirs = (
                    {seed: who(row, at, classes=classes) for seed, row in arm.items()} for arm in (of_seed, baseline)
                )
                mark = _device_mark(of_seed, baseline)
                cells.append("" if other == name else f"{paired(mine, theirs)}{mark}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mutual_learning(rows: Sequence[Row], at: str, classes: str = "test") -> str:
    """A sentence about what mutual learning gives, over all pairs of arms with the same diversities.

    The mean of a seed's five differences varies less than each of them. The sentence is empty where
    these arms have no seed in common.
    """
    arms = by_arm(rows)
    ends = ("", *(f" + {diversity}" for diversity in (*DIVERSITIES, "all")))
    kinds = [[arms.get(f"{kind}{end}", {}) for end in ends] for kind in ("mutual", BASELINE)]
    seeds = set.intersection(*(set(arm) for kind in kinds for arm in kind))
    if not seeds:
        return ""
    kinds = [[{seed: arm[seed] for seed in seeds} for arm in kind] for kind in kinds]
    mark = TWO_DEVICES if any(map(_device_mark, *kinds)) else ""
    differences = []
    for who in (mean_peer, ensemble):
        mutual, independent = (
            {seed: float(np.mean([who(arm[seed], at, classes=classes) for arm in kind])) for seed in seeds}
            for kind in kinds
        )
        differences.append(f"{paired(mutual, independent)}{mark}")
    return (
        "Mutual learning, averaged over the five pairs of arms with none, one and all of the diversities "
        f"({len(seeds)} seeds): mean peer R@1 {differences[0]}, ensemble R@1 {differences[1]}."
    )


def _device_mark(arm: Mapping[int, Row], other: Mapping[int, Row]) -> str:
    """TWO_DEVICES if a seed of both arms ran on two devices: the same seed then gives two figures."""
    both = arm.keys() & other.keys()
    unlike = any(arm[seed]["device"] != other[seed]["device"] for seed in both)
    return TWO_DEVICES if unlike else ""


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """Writes `report.md` and the two plots into the folder; returns the page's path."""
    write_plots(rows, folder)
    tables = []
    for title, where in TABLES.items():
        parts = (f"## {title}", table(rows, *where), mutual_learning(rows, *where))
        tables.append("\n\n".join(filter(None, parts)))
    note = (
        "Percent, mean ± standard deviation over seeds. The best peer is the one with the best Recall@1 on "
        "validation classes. Differences have the 95 % interval of a paired t-test over seeds, each on its own: "
        "of twenty comparisons of equals, one interval lies off zero."
    )
    if any(TWO_DEVICES in one for one in tables):
        note += f"{TWO_DEVICES}: some pairs of seeds ran on two devices."
    page = folder / "report.md"
    sections = [
        "# All arms",
        "`python experiments/ablation.py` generates this page from `rows.jsonl`.",
        f"{provenance(rows)}. {note}",
        *tables,
        "![Differences from independent peers](differences.png)",
        "![What makes it work](mechanism.png)",
    ]
    page.write_text("\n\n".join(sections) + "\n")
    return page


def write_plots(rows: Sequence[Row], folder: Path) -> None:
    """Writes `differences.png` and `mechanism.png`."""
    arms = by_arm(rows)
    figure = Figure(figsize=(11, 0.32 * len(arms) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _plot_differences(left, arms, mean_peer, "mean peer")
    _plot_differences(right, arms, ensemble, "ensemble")
    figure.savefig(folder / "differences.png", dpi=110)
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    _plot_curves(axes[0, 0], arms, lambda point: point["agreement"])
    axes[0, 0].set_title("Agreement: correlation of the peers' cosines, validation classes", fontsize=10)
    _plot_curves(axes[0, 1], arms, lambda point: 100 * point["gap"])
    axes[0, 1].set_title("Mean peer's Recall@1: training minus validation classes, points", fontsize=10)
    _plot_only_one(axes[1, 0], arms)
    _plot_sizes(axes[1, 1], arms)
    figure.savefig(folder / "mechanism.png", dpi=110)


def _colour(name: str) -> str:
    return COLOURS.get(name.split(" ")[0].rstrip(","), COLOURS["other"])


def _deviation(values: Sequence[Any]) -> Any:
    """Standard deviation over seeds (the first axis); 0 for a single seed."""
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def _plot_differences(axes: Axes, arms: Arms, who: Any, title: str) -> None:
    if BASELINE not in arms:
        return
    names = [name for name in reversed(list(arms)) if name != BASELINE]
    for y, name in enumerate(names):
        colour = _colour(name)
        for at, offset, marker, fill in (("last", 0.15, "o", "full"), ("best", -0.15, "D", "none")):
            mine, theirs = ({seed: who(row, at) for seed, row in arms[arm].items()} for arm in (name, BASELINE))
            found = paired(mine, theirs)
            if not found.seeds:
                continue
            axes.plot(found.mean, y + offset, marker, color=colour, markersize=5, fillstyle=fill)
            if found.seeds >= MIN_SEEDS:
                axes.hlines(y + offset, found.low, found.high, color=colour, lw=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0, color="#888", lw=0.8)
    axes.grid(axis="x", color="#eee")
    axes.set_title(f"{title}: Recall@1 minus that of independent peers, points", fontsize=10)
    axes.set_xlabel("filled: last step; open: best step on validation classes", fontsize=9)


def _plot_curves(axes: Axes, arms: Arms, key: Callable[[Row], float]) -> None:
    """Mean and standard deviation over seeds, against the step."""
    styles = {"mutual + all": "--", "independent + all": "--", "mutual + all + ema": ":"}
    for name in CURVES:
        if name not in arms:
            continue
        rows, colour = list(arms[name].values()), _colour(name)
        curves = [[key(point) for point in row["curve"]] for row in rows]
        steps = [point["step"] for point in rows[0]["curve"]]
        mean, deviation = np.mean(curves, axis=0), _deviation(curves)
        axes.plot(steps, mean, styles.get(name, "-"), color=colour, label=name)
        axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.1)
    axes.set_xlabel("step")
    axes.grid(color="#eee")
    axes.legend(fontsize=8, frameon=False)


def _plot_only_one(axes: Axes, arms: Arms) -> None:
    names = [name for name in reversed(list(arms)) if ARMS[name].num_peers == 2]
    values = [[100 * row["last"]["only_one"] for row in arms[name].values()] for name in names]
    means, deviations = [np.mean(each) for each in values], [_deviation(each) for each in values]
    axes.barh(range(len(names)), means, xerr=deviations, color=list(map(_colour, names)), height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title("Test queries that only one peer gets right, percent", fontsize=10)
    axes.set_xlabel("bands and bars in all plots: standard deviation over seeds", fontsize=9)


def _plot_sizes(axes: Axes, arms: Arms) -> None:
    for kind in ("independent", "mutual"):
        members = {1: "single net", 2: f"{kind} + all"}
        members |= {num: f"{kind} + all, M = {num}" for num in (3, 4)}
        sizes = [num for num, arm in members.items() if arm in arms]
        if not sizes:
            continue
        for who, style, label in ((mean_peer, "o-", "mean peer"), (ensemble, "s--", "ensemble")):
            values = [[who(row, "last") for row in arms[members[size]].values()] for size in sizes]
            axes.errorbar(
                sizes,
                [np.mean(each) for each in values],
                [_deviation(each) for each in values],
                fmt=style,
                color=_colour(kind),
                label=f"{kind} + all, {label}",
                capsize=2,
            )
    axes.set_xticks([1, 2, 3, 4])
    axes.set_xlabel("peers M")
    axes.grid(color="#eee")
    axes.set_title("Recall@1 at the last step against the cohort's size, test classes", fontsize=10)
    if axes.has_data():
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
