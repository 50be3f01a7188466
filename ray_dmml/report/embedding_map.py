"""A map of the test embeddings in two dimensions."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg

from ray_dmml.report.data import Dot, Map, Placed
from ray_dmml.report.gallery import Retrievals, the

WIDTH, HEIGHT, MARGIN = 900, 620, 26
"""Of the map, in the units of its SVG."""

MAX_DOTS = 6000
"""Images on the map. Of more, some are chosen at random."""

NUM_NAMED = 8
"""Classes that are named and coloured."""

CELL = 58
"""One picture stands in each square of this side, where there is an image."""


def embedding_map(retrievals: Retrievals, embeddings: np.ndarray, named: Sequence[str]) -> tuple[Map, np.ndarray]:
    """The map, without pictures, and the images that are on it.

    Args:
        embeddings: (N, D) of the main system.
        named: names of classes to colour.
    """
    images, labels = retrievals.images, retrievals.images.labels
    chosen = np.arange(len(images))
    if len(chosen) > MAX_DOTS:
        chosen = np.sort(np.random.default_rng(0).choice(len(images), MAX_DOTS, replace=False))
    places, how = _places(embeddings[chosen])
    x, y = _scaled(places)
    state = np.full(len(images), 2, dtype=np.int64)  # no query
    state[retrievals.queries] = np.where(retrievals.is_found(retrievals.main), 1, 0)
    state, dot_labels = state[chosen], labels[chosen]
    label_of = {retrievals.class_name(label): label for label in range(images.num_classes)}
    styles = np.full(images.num_classes, -1)
    classes = []
    for style, name in enumerate(named[:NUM_NAMED]):
        label = label_of[name]
        inside = np.flatnonzero(dot_labels == label)
        if len(inside):
            styles[label] = style
            middle = inside[np.hypot(x[inside] - np.median(x[inside]), y[inside] - np.median(y[inside])).argmin()]
            classes.append(Dot(name, style, _dots(x[inside], y[inside]), float(x[middle]), float(y[middle])))
    is_plain = styles[dot_labels] < 0
    note = f"{how}, of {the(retrievals.main)}'s embeddings."
    if len(chosen) < len(images):
        note += f" {len(chosen):,} of {len(images):,} images, chosen at random."
    used, compact = np.unique(dot_labels, return_inverse=True)
    data: dict[str, Any] = {
        "x": x.tolist(),
        "y": y.tolist(),
        "state": state.tolist(),
        "label": compact.tolist(),
        "classes": [retrievals.class_name(int(label)) for label in used],
        "names": [retrievals.tile(int(image)).name for image in chosen],
        "sheet": {},
    }
    return (
        Map(
            note,
            _dots(x[is_plain & (state == 1)], y[is_plain & (state == 1)]),
            _crosses(x[state == 0], y[state == 0]),
            _dots(x[is_plain & (state == 2)], y[is_plain & (state == 2)]),
            tuple(classes),
            tuple(
                Placed(int(chosen[n]), retrievals.class_name(int(dot_labels[n])), float(x[n]), float(y[n]))
                for n in _one_a_cell(x, y)
            ),
            data,
            (),
        ),
        chosen,
    )


def principal_components(embeddings: np.ndarray) -> tuple[np.ndarray, float]:
    """(N, 2) places on the two axes of largest variance, and their share of the variance."""
    centered = np.asarray(embeddings, dtype=np.float64)
    centered = centered - centered.mean(axis=0)
    size = centered.shape[1]
    variances, axes = scipy.linalg.eigh(centered.T @ centered, subset_by_index=(max(size - 2, 0), size - 1))
    axes = axes[:, ::-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    total = float((centered**2).sum())
    places = centered @ axes
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 1)))
    return places, float(variances.sum()) / total if total else 0.0


def _places(embeddings: np.ndarray) -> tuple[np.ndarray, str]:
    if importlib.util.find_spec("umap") is not None and len(embeddings) > 15:  # of its neighbours
        import umap

        return umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(embeddings), "A UMAP"
    places, share = principal_components(embeddings)
    return places, f"The two principal components, which have {100 * share:.0f} % of the variance"


def _scaled(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole units of the SVG; both axes have one scale."""
    low, high = places.min(axis=0), places.max(axis=0)
    extent = np.maximum(high - low, 1e-12)
    if extent[0] < extent[1]:  # the longer side lies flat
        places, low, high, extent = places[:, ::-1], low[::-1], high[::-1], extent[::-1]
    scale = min((WIDTH - 2 * MARGIN) / extent[0], (HEIGHT - 2 * MARGIN) / extent[1])
    middle = (low + high) / 2
    x = WIDTH / 2 + (places[:, 0] - middle[0]) * scale
    y = HEIGHT / 2 - (places[:, 1] - middle[1]) * scale
    return np.round(x).astype(int), np.round(y).astype(int)


def _dots(x: np.ndarray, y: np.ndarray) -> str:
    """Dots as one path: lines of no length have round ends."""
    return "".join(f"M{a} {b}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _crosses(x: np.ndarray, y: np.ndarray) -> str:
    return "".join(f"M{a - 3} {b - 3}l6 6m0-6l-6 6" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _one_a_cell(x: np.ndarray, y: np.ndarray) -> list[int]:
    """The dot nearest to the middle of each square of the map."""
    nearest: dict[tuple[int, int], tuple[float, int]] = {}
    for n, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        cell = (a // CELL, b // CELL)
        distance = math.hypot(a - (cell[0] + 0.5) * CELL, b - (cell[1] + 0.5) * CELL)
        if distance < nearest.get(cell, (math.inf, 0))[0]:
            nearest[cell] = (distance, n)
    return [n for _, n in nearest.values()]


def with_sheets(of: Map, sheets: Mapping[str, Any], uris: tuple[str, ...]) -> Map:
    """The map with the small pictures that its script shows."""
    return Map(of.note, of.found, of.missed, of.others, of.classes, of.placed, {**of.data, "sheet": sheets}, uris)
