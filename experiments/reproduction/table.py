"""The table at the end: our figures with intervals over seeds, beside published ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from runner.figures import Seeds, Value, paired, points
from runner.rows import Row

from ray_dmml.data.datasets.benchmarks import BENCHMARKS
from ray_dmml.evaluation.compare import t_interval

from .arms import ARMS, DM2, INDEPENDENT, SINGLE, STUDENT_OF_FROZEN

PUBLISHED = Path(__file__).parent / "published.yaml"


class Line(NamedTuple):
    """A line of the table."""

    title: str
    arm: str
    part: str
    """What of a row: `peers` (their mean), `ensemble`, `teacher` or `untrained`."""

    baseline: tuple[str, str] | None = None
    """The arm and part that it is compared with."""

    published: str | None = None
    """`line` of published.yaml."""


def lines(names: Sequence[str]) -> Iterator[Line]:
    """The lines of arms."""
    for name in names:
        arm = ARMS[name]
        if name == SINGLE:
            yield Line("untrained backbone, frozen", SINGLE, "untrained")
            yield Line(SINGLE, SINGLE, "peers", (SINGLE, "untrained"), "single")
        elif arm.is_cohort:
            for part, who in (("peers", "mean peer"), ("ensemble", "ensemble")):
                baseline = (SINGLE, "peers") if name == INDEPENDENT else (INDEPENDENT, part)
                yield Line(f"{name}: {who}", name, part, baseline, "dm2" if name == DM2 else None)
        else:
            if name == STUDENT_OF_FROZEN:
                yield Line("frozen net, which teaches", name, "teacher", None, "teacher")
            yield Line(name, name, "peers", (SINGLE, "peers"))


def value_of(part: str, metric: str) -> Value:
    """A figure of a part of a row, in percent. Peers give their mean."""

    def value(row: Mapping[str, Any]) -> float:
        figures = row[part] if part == "peers" else [row[part]]
        return 100 * float(np.mean([each[metric] for each in figures]))

    return value


def percent(values: Sequence[float]) -> str:
    """The mean and half the width of its 95 % interval over seeds, of which there must be three."""
    mean, half = t_interval(values)
    return f"{mean:.1f}" + ("" if np.isnan(half) else f" ± {half:.1f}")


def report(data: str, rows: Sequence[Row], metrics: Sequence[str], settings: Sequence[str], teacher: str) -> str:
    """The page, as Markdown.

    Args:
        data: name of the data set.
        rows: those of one plan.
        metrics: names of the columns.
        settings: what `--set` changed.
        teacher: the frozen net that teaches.
    """
    title = BENCHMARKS[data].title
    by_arm: dict[str, dict[int, Row]] = {name: {} for name in ARMS}
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    published = [each for each in yaml.safe_load(PUBLISHED.read_text()) if data in each["recall"]]
    beside = [each for each in published if each.get("teacher") in (None, teacher)]
    table, sources = _table(data, by_arm, metrics, beside)
    texts = [
        f"# {title}",
        "Percent on the test classes, at the last step: the mean over seeds, ± half the width of its 95 % interval "
        "(Student's t) if there are three seeds. R@1 is Recall@1. The gain is in points of R@1, paired by seed: of the "
        "single net over its untrained backbone, of independent peers and students over the single net, and of other "
        "cohorts over independent peers (mean peer over mean peer, ensemble over ensemble).",
        *_warnings(data, rows, settings),
        table,
        *(f"[{number}] {source}" for number, source in enumerate(sources, 1)),
        f"Peers start with equal weights unless it says that these differ. The frozen net is {teacher}.",
        f"## What others report on {title}",
        _others(data, published),
        _provenance(data, rows),
    ]
    return "\n\n".join(texts) + "\n"


def _table(
    data: str, by_arm: Mapping[str, Seeds], metrics: Sequence[str], published: Sequence[Mapping[str, Any]]
) -> tuple[str, list[str]]:
    """The main table, and the sources of its published figures."""
    cells = [["", "seeds", *(metric.replace("recall", "R").replace("map@r", "MAP@R") for metric in metrics)]]
    cells[0] += ["gain", "published R@1"]
    sources: list[str] = []
    for line in lines([name for name, seeds in by_arm.items() if seeds]):
        seeds, gain = by_arm[line.arm], ""
        if line.baseline:
            arm, part = line.baseline
            recall = [value_of(each, "recall@1") for each in (line.part, part)]
            gain = points(*paired(seeds, by_arm[arm], *recall))
        beside = []
        for each in published:
            if line.published and each.get("line") == line.published:
                source = f"{each['method']}, {each['net']}: {each['read_in']}"
                sources += [source] if source not in sources else []
                beside.append(f"{each['recall'][data]} [{sources.index(source) + 1}]")
        values = [percent([value_of(line.part, metric)(row) for row in seeds.values()]) for metric in metrics]
        cells.append([line.title, str(len(seeds)), *values, gain, ", ".join(beside) or "not published"])
    return markdown(cells), sources


def _others(data: str, published: Sequence[Mapping[str, Any]]) -> str:
    if not published:
        return "We know of no published figure."
    cells = [["method", "net", "R@1", "read in"]]
    cells += [[each["method"], each["net"], each["recall"][data], each["read_in"]] for each in published]
    return markdown(cells)


def _warnings(data: str, rows: Sequence[Row], settings: Sequence[str]) -> Iterator[str]:
    official = list(BENCHMARKS[data].counts)
    if counts := sorted({tuple(row["counts"]) for row in rows} - {tuple(official)}):
        text = "{} training images of {} classes and {} test images of {}"
        yield (
            f"**These figures do not compare with published ones**: the folder has {text.format(*counts[0])}, and the "
            f"official numbers are {text.format(*official)}."
        )
    if settings:
        yield f"Settings other than `experiments/configs/{data}.yaml`: {', '.join(f'`{each}`' for each in settings)}."


def _provenance(data: str, rows: Sequence[Row]) -> str:
    hours = sum(row["seconds"] for row in rows) / 3600
    devices, commits = (", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit"))
    return (
        f"{len(rows)} runs, {hours:.1f} hours in total (of a run that was resumed, those after the last start), on "
        f"{devices}; commit {commits}. `python experiments/reproduce.py {data}` made this page."
    )


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table with columns that are also straight in a terminal. The first row is the heading."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {padded[0]} |", f"|{rule}|", *(f"| {row} |" for row in padded[1:])])
