"""What results.json says, for a person: its rows, and which images they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HEADINGS = {"map@r": "MAP@R", "r_precision": "R-prec"}

MAIN = ("recall@", "map@r", "r_precision")
"""What the names of metrics with a column in a table begin with."""

Intervals = Mapping[str, Sequence[float]]
Row = tuple[str, Mapping[str, float], Intervals]
"""Name, figures, and the ends of their 95 % intervals as far as they are known."""


def heading(metric: str) -> str:
    """The heading of a metric's column."""
    return _HEADINGS.get(metric, metric.replace("recall@", "R@"))


def main_metrics(results: Mapping[str, Any]) -> list[str]:
    """The metrics that a table shows."""
    return [metric for metric in results["ensemble"] if metric.startswith(MAIN)]


def verification_keys(figures: Mapping[str, Any]) -> list[str]:
    """The figures of a system's verification that a table shows."""
    return [key for key in figures if key.startswith(("roc_auc", "fnmr@", "threshold@"))]


def verification_heading(key: str) -> str:
    """The heading of such a figure's column."""
    name, _, fmr = key.partition("@")
    if name == "roc_auc":
        return "ROC AUC"
    return f"{'FNMR' if name == 'fnmr' else name} at FMR {100 * float(fmr):g} %"


def rows_of(results: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a table: each frozen backbone, the peers and the ensemble before training, the peers, the ensemble of
    frozen teachers if there are several, the ensemble. Frozen peers do not change and have one row."""
    backbones = _distinct(results["frozen_backbones"])
    for names, figures in backbones:
        yield "frozen backbone" if len(backbones) == 1 else f"{', '.join(names)}, frozen backbone", figures, {}
    before = "at the start" if results["init_from"] else "untrained"
    learners = [name for name in results["untrained"] if name in results["frozen_backbones"]]
    for name in learners:
        yield f"{name}, {before}", results["untrained"][name], {}
    if results["untrained_ensemble"] and len(learners) == len(results["untrained"]):
        yield f"ensemble, {before}", results["untrained_ensemble"], {}
    intervals = results.get("intervals", {})
    for name, figures in results["peers"].items():
        yield name, figures, intervals.get("peers", {}).get(name, {})
    has_teachers = "teachers_ensemble" in results
    if has_teachers:
        yield "ensemble of the teachers", results["teachers_ensemble"], intervals.get("teachers_ensemble", {})
    yield "ensemble of all" if has_teachers else "ensemble", results["ensemble"], intervals.get("ensemble", {})


def describe_images(results: Mapping[str, Any]) -> str:
    """Which images the figures are of, and whether their classes were trained on."""
    split, images, classes = results["split"], "images", "classes"
    if split == "other":
        images = "other images"
    elif results["split_by"] == "image":
        images, classes = f"{split} images", "known classes"
    else:
        classes = "unseen classes" if split == "test" else f"{split} classes"
    counts = f"{results['num_images']:,} {images}"
    if results["num_queries"] is not None:
        counts = f"{results['num_queries']:,} queries in {results['num_gallery']:,} {images}"
    return f"{counts} of {results['num_classes']} {classes}"


def describe_unevaluated(results: Mapping[str, Any]) -> str:
    """Why there are no figures."""
    return f"not evaluated: all {'images' if results['split_by'] == 'image' else 'classes'} were trained on"


def _distinct(figures_of: Mapping[str, Mapping[str, float]]) -> list[tuple[list[str], Mapping[str, float]]]:
    """Equal figures once, with the names of the peers that have them."""
    rows: list[tuple[list[str], Mapping[str, float]]] = []
    for name, figures in figures_of.items():
        names = next((names for names, known in rows if known == figures), None)
        if names is None:
            rows.append(([name], figures))
        else:
            names.append(name)
    return rows
