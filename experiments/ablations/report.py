"""Tables and plots of the ablation's rows, and where they stand in experiments/README.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ray_dmml.errors import UserError

from .arms import ARMS, DIVERSITIES
from .running import made_of

BASELINE = "independent"
FEWEST = 3
"""Seeds that an interval needs."""

TWO_DEVICES = " †"
"""After a difference that is not of one device throughout."""

CURVES = ("independent", "independent + all", "mutual", "mutual + all", "mutual + all + ema")
COLOURS = {
    "independent": "#8a929c",
    "mutual": "#2563a8",
    "other": "#d9822b",
}
TABLES = {
    "At the last step": ("last", "test"),
    "At the step that was best on validation classes": ("best", "test"),
    "At the last step, on validation classes, by which the best peer was chosen": (
        "last",
        "validation",
    ),
}
"""Title, step, and classes that are judged on."""

Row = Mapping[str, Any]


def mean_peer(row: Row, at: str, metric: str = "recall@1", classes: str = "test") -> float:
    """Percent."""
    return 100 * float(np.mean([peer[metric] for peer in row[at][classes]["peers"]]))


def best_peer(row: Row, at: str, metric: str = "recall@1", classes: str = "test") -> float:
    """Of the peer that is best on validation classes."""
    found = row[at]
    position = int(np.argmax([peer["recall@1"] for peer in found["validation"]["peers"]]))
    return 100 * float(found[classes]["peers"][position][metric])


def ensemble(row: Row, at: str, metric: str = "recall@1", classes: str = "test") -> float:
    return 100 * float(row[at][classes]["ensemble"][metric])


class Difference(NamedTuple):
    """Of two arms, seed by seed."""

    mean: float
    low: float
    """Ends of the 95 % interval of the paired t-test; NaN below three seeds, which can tell none: two
    that agree by chance would be certain."""

    high: float
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "-"
        interval = f" [{self.low:+.1f}, {self.high:+.1f}]" if self.seeds >= FEWEST else ""
        return f"{self.mean:+.1f}{interval}"


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Arm less baseline, over the seeds (keys) that both have."""
    seeds = sorted(arm.keys() & baseline.keys())
    differences = np.array([arm[seed] - baseline[seed] for seed in seeds])
    if len(seeds) < FEWEST:
        mean = float(differences.mean()) if len(seeds) else float("nan")
        return Difference(mean, float("nan"), float("nan"), len(seeds))
    error = float(stats.sem(differences))
    half = float(stats.t.ppf(0.975, len(seeds) - 1)) * error
    mean = float(differences.mean())
    return Difference(mean, mean - half, mean + half, len(seeds))


def by_arm(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Arm to seed to row, in the order of the arms."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[row["arm"]].setdefault(row["seed"], row)
    return {name: found[name] for name in ARMS if name in found}


def table(rows: Sequence[Row], at: str, classes: str = "test") -> str:
    """In Markdown: mean and deviation over seeds, and differences from independent peers."""
    head = [
        "arm",
        "seeds",
        "mean peer R@1",
        "best peer R@1",
        "ensemble R@1",
        "mean peer MAP@R",
        "ensemble MAP@R",
        f"mean peer R@1 − {BASELINE}",
        f"ensemble R@1 − {BASELINE}",
        "mean peer R@1 − the same, independent",
        "ensemble R@1 − the same, independent",
    ]
    arms = by_arm(rows)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, of_seed in arms.items():
        alike = next((row["same_as"] for row in of_seed.values() if "same_as" in row), None)
        cells = [f"{name} (same settings as {alike})" if alike else name, str(len(of_seed))]
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
        alone = name.replace("mutual", "independent").removesuffix(", unit length")
        for other in (BASELINE, alone):
            for who in (mean_peer, ensemble):
                mine, theirs = (
                    {seed: who(row, at, classes=classes) for seed, row in found.items()}
                    for found in (of_seed, arms.get(other, {}))
                )
                mark = _mark(of_seed, arms.get(other, {}))
                cells.append("" if other == name else f"{paired(mine, theirs)}{mark}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mutual_learning(rows: Sequence[Row], at: str, classes: str = "test") -> str:
    """In a sentence, what mutual learning gives over all pairs of arms of the same diversities: the mean of a
    seed's five differences varies less than each. Empty where these arms have no seed in common."""
    arms = by_arm(rows)
    ends = ("", *(f" + {diversity}" for diversity in (*DIVERSITIES, "all")))
    kinds = [[arms.get(f"{kind}{end}", {}) for end in ends] for kind in ("mutual", BASELINE)]
    seeds = set.intersection(*(set(arm) for kind in kinds for arm in kind))
    if not seeds:
        return ""
    kinds = [[{seed: arm[seed] for seed in seeds} for arm in kind] for kind in kinds]
    mark = TWO_DEVICES if any(map(_mark, *kinds)) else ""
    found = []
    for who in (mean_peer, ensemble):
        mutual, independent = (
            {seed: np.mean([who(arm[seed], at, classes=classes) for arm in kind]) for seed in seeds}
            for kind in kinds
        )
        found.append(f"{paired(mutual, independent)}{mark}")
    return (
        "Mutual learning, over the pairs of arms with none, one and all of the diversities "
        f"({len(seeds)} seeds, of each the mean of the five differences): mean peer R@1 {found[0]}, "
        f"ensemble R@1 {found[1]}."
    )


def _mark(arm: Mapping[int, Row], other: Mapping[int, Row]) -> str:
    """Of a difference: whether a pair of it is of two devices, on which the same seed gives two figures."""
    both = arm.keys() & other.keys()
    unlike = any(arm[seed]["device"] != other[seed]["device"] for seed in both)
    return TWO_DEVICES if unlike else ""


def write_report(rows: Sequence[Row], folder: Path, page: Path) -> None:
    """Puts the plots into the folder, and the tables into the page.

    A page in the folder itself has nothing else; another has them between its marks `<!-- NAME -->` and
    `<!-- /NAME -->`, the name being the folder's.

    Raises:
        UserError: that other page lacks the marks.
    """
    write_plots(rows, folder)
    plots = folder.resolve().relative_to(page.resolve().parent).as_posix()
    tables = [
        "\n\n".join(
            filter(None, (f"\n{title}:", table(rows, *where), mutual_learning(rows, *where)))
        )
        for title, where in TABLES.items()
    ]
    marked = any(TWO_DEVICES in one for one in tables)
    lines = [
        f"{made_of(rows)}. Percent, "
        "mean ± standard deviation over seeds; differences with the 95 % interval of a paired t-test over "
        "seeds, each for itself: of twenty that compare equals, one lies off zero."
        + (
            f"{TWO_DEVICES}: in part or all of the pairs the two are of two devices."
            if marked
            else ""
        ),
        *tables,
        f"\n![Differences from independent peers]({plots}/differences.png)",
        f"\n![What makes it work]({plots}/mechanism.png)",
    ]
    text = "\n".join(lines) + "\n"
    if page.parent != folder:
        before, begin, rest = page.read_text().partition(f"<!-- {folder.name} -->\n")
        _, end, after = rest.partition(f"<!-- /{folder.name} -->\n")
        if not (begin and end):
            raise UserError(
                f"{page} has no marks <!-- {folder.name} --> and <!-- /{folder.name} -->"
            )
        text = f"{before}{begin}\n{text}\n{end}{after}"
    page.write_text(text)


def write_plots(rows: Sequence[Row], folder: Path) -> None:
    """`differences.png` and `mechanism.png`."""
    arms = by_arm(rows)
    figure = Figure(figsize=(11, 0.32 * len(arms) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _differences(left, arms, mean_peer, "mean peer")
    _differences(right, arms, ensemble, "ensemble")
    figure.savefig(folder / "differences.png", dpi=110)
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    _agreement(axes[0, 0], arms)
    _gap(axes[0, 1], arms)
    _only_one(axes[1, 0], arms)
    _sizes(axes[1, 1], arms)
    figure.savefig(folder / "mechanism.png", dpi=110)


def _colour(name: str) -> str:
    return COLOURS.get(name.split(" ")[0].rstrip(","), COLOURS["other"])


def _differences(axes: Axes, arms: Mapping[str, Mapping[int, Row]], who: Any, title: str) -> None:
    shown = [name for name in arms if name != BASELINE]
    if BASELINE not in arms:
        return
    for place, name in enumerate(reversed(shown)):
        for at, offset, marker in (("last", 0.15, "o"), ("best", -0.15, "D")):
            mine = {seed: who(row, at) for seed, row in arms[name].items()}
            theirs = {seed: who(row, at) for seed, row in arms[BASELINE].items()}
            found = paired(mine, theirs)
            if not found.seeds:
                continue
            axes.plot(
                found.mean,
                place + offset,
                marker,
                color=_colour(name),
                markersize=5,
                fillstyle="full" if at == "last" else "none",
            )
            if found.seeds >= FEWEST:
                axes.hlines(place + offset, found.low, found.high, color=_colour(name), lw=1.2)
    axes.set_yticks(range(len(shown)), list(reversed(shown)))
    axes.axvline(0, color="#888", lw=0.8)
    axes.grid(axis="x", color="#eee")
    axes.set_title(f"{title}: Recall@1 less that of independent peers, points", fontsize=10)
    axes.set_xlabel("filled: last step; open: best step on validation classes", fontsize=9)


def _over_training(arms: Mapping[str, Mapping[int, Row]], key: Callable[[Row], float]) -> Any:
    """Name, steps, mean and deviation over seeds, of the arms that are plotted."""
    for name in CURVES:
        if name in arms:
            curves = [[key(point) for point in row["curve"]] for row in arms[name].values()]
            steps = [point["step"] for point in next(iter(arms[name].values()))["curve"]]
            yield name, steps, np.mean(curves, axis=0), _deviation(curves)


def _deviation(values: Sequence[Any]) -> Any:
    """Over seeds, which come first; 0 of a single one."""
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def _lines(axes: Axes, found: Any) -> None:
    styles = {"mutual + all": "--", "independent + all": "--", "mutual + all + ema": ":"}
    for name, steps, mean, deviation in found:
        axes.plot(steps, mean, styles.get(name, "-"), color=_colour(name), label=name)
        axes.fill_between(steps, mean - deviation, mean + deviation, color=_colour(name), alpha=0.1)
    axes.set_xlabel("step")
    axes.grid(color="#eee")
    axes.legend(fontsize=8, frameon=False)


def _agreement(axes: Axes, arms: Mapping[str, Mapping[int, Row]]) -> None:
    _lines(axes, _over_training(arms, lambda point: point["agreement"]))
    axes.set_title("Agreement: correlation of the peers' cosines, validation classes", fontsize=10)


def _gap(axes: Axes, arms: Mapping[str, Mapping[int, Row]]) -> None:
    _lines(axes, _over_training(arms, lambda point: 100 * point["gap"]))
    axes.set_title("Mean peer's Recall@1: training less validation classes, points", fontsize=10)


def _only_one(axes: Axes, arms: Mapping[str, Mapping[int, Row]]) -> None:
    names = [name for name, arm in ARMS.items() if name in arms and arm.num_peers == 2]
    values = [
        [100 * row["last"]["only_one"] for row in arms[name].values()] for name in reversed(names)
    ]
    means, deviations = [np.mean(each) for each in values], [_deviation(each) for each in values]
    colours = [_colour(name) for name in reversed(names)]
    axes.barh(range(len(names)), means, xerr=deviations, color=colours, height=0.7)
    axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    axes.set_title(
        "Overlap of errors: test queries that only one peer gets right, percent", fontsize=10
    )
    axes.set_xlabel("bands and bars in all plots: standard deviation over seeds", fontsize=9)


def _sizes(axes: Axes, arms: Mapping[str, Mapping[int, Row]]) -> None:
    for name in ("independent", "mutual"):
        members = {1: "single net", 2: f"{name} + all"}
        members |= {num: f"{name} + all, M = {num}" for num in (3, 4)}
        sizes = [num for num, arm in members.items() if arm in arms]
        if not sizes:
            continue
        for who, style in ((mean_peer, "o-"), (ensemble, "s--")):
            values = [[who(row, "last") for row in arms[members[size]].values()] for size in sizes]
            label = f"{name} + all, {'ensemble' if who is ensemble else 'mean peer'}"
            mean, deviation = (
                [np.mean(each) for each in values],
                [_deviation(each) for each in values],
            )
            axes.errorbar(
                sizes, mean, deviation, fmt=style, color=_colour(name), label=label, capsize=2
            )
    axes.set_xticks([1, 2, 3, 4])
    axes.set_xlabel("peers M")
    axes.grid(color="#eee")
    axes.set_title("Recall@1 at the last step against the cohort's size, test classes", fontsize=10)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}
    axes.legend(fontsize=8, frameon=False, ncols=2, **below)
