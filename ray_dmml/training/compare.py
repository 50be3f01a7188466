"""Compares finished runs on the same images: which one is better, by how much, and on which queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ray_dmml.config.differences import CHANGES_NO_TRAINING, differing, settings_without
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError
from ray_dmml.evaluation.bootstrap import NUM_RESAMPLES
from ray_dmml.evaluation.compare import Values, compare_values
from ray_dmml.evaluation.evaluation import Evaluation
from ray_dmml.evaluation.neighbors import Ints
from ray_dmml.training.evaluate import RunEmbeddings, embed_run, open_run
from ray_dmml.training.image_list import ImageList
from ray_dmml.training.run_dir import RunDir

SEEDS = ("seed", "data.validation_fold", "data.validation_seed")
"""Runs that differ only in these are seeds of one setting."""

CHANGES_NO_RESULT = (*CHANGES_NO_TRAINING, "evaluation.*")
"""Settings in which runs of one setting may differ. The comparison evaluates all runs alike."""

MEAN_PEER = "mean_peer"
"""The mean of the peers that learn, as a system beside them and the ensemble."""


@dataclass(frozen=True, eq=False)
class _Run:
    """An evaluated run."""

    path: Path
    run_dir: RunDir
    seed: tuple[Any, ...]
    settings: Mapping[str, Any]
    """Dotted keys, without those that change no result."""
    split: str
    images: ImageSet
    weights: str
    step: int
    queries: Ints
    values: Mapping[str, Values]
    """By system, of each query."""


def compare(
    runs: Sequence[Path | str],
    weights: str | None = None,
    *,
    data: Path | str | None = None,
    trust_code: bool = False,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """Evaluates two or more runs on the same images, in this process, and compares them. It writes nothing.

    Runs that differ only in their seed are one setting. The first setting is compared with each of the others; the runs
    of a single setting are compared with the first one of them. Runs with the same seed are pairs.

    Args:
        runs: their folders, the baseline first.
        weights: as in :func:`~ray_dmml.training.evaluate.evaluate`, for all runs.
        data: the same.
        trust_code: the same.
        num_resamples: of the bootstrap over classes; 1,000 by default.

    Returns:
        A dict that JSON can hold, with these entries.

        - ``split``, ``num_queries``, ``num_classes``: what the runs are evaluated on.
        - ``settings``: for each, its ``runs``, ``seeds``, ``weights`` and ``steps``.
        - ``differing``: the settings that differ: key to a list, a value for each of ``settings``.
        - ``comparisons``: for each, ``first`` and ``second`` (numbers of ``settings``), ``num_pairs`` of runs with the
          same seed, ``systems``, ``macro`` and ``found_only_by``. ``systems`` has a dict for each system and metric,
          see ``ray_dmml.evaluation.compare.Difference``; ``macro`` has the same for means over classes.
          ``found_only_by`` has for each system the names of the queries that ``first`` or ``second`` finds at rank 1
          in more than half of its runs, and the other one does not.

    Raises:
        UserError: fewer than two runs, a run is named twice, the runs are not evaluated on the same images or have no
            system in common; and as in :func:`~ray_dmml.training.evaluate.evaluate`.
    """
    paths = [Path(run) for run in runs]
    if len(paths) < 2:
        raise UserError("a comparison needs two or more runs")
    if twice := {str(path) for path in paths if [each.resolve() for each in paths].count(path.resolve()) > 1}:
        raise UserError(f"{', '.join(sorted(twice))}: a run is compared with others, and named once")
    # All are opened before the first is embedded, which may take minutes.
    run_dirs = [open_run(path, trust_code)[0] for path in paths]
    recall_at = sorted({k for run_dir in run_dirs for k in run_dir.config().evaluation.recall_at})
    loaded: list[_Run] = []
    for path, run_dir in zip(paths, run_dirs, strict=True):
        check = partial(_require_same_images, path, run_dir, loaded[0], data is None) if loaded else None
        # Only the figures of the queries are kept: embeddings of many runs do not fit into memory.
        embedded = embed_run(path, weights, data=data, trust_code=trust_code, check=check)
        loaded.append(_load(path, embedded, recall_at))
    images, queries = loaded[0].images, loaded[0].queries
    groups = _group(loaded)
    if len(groups) == 1:
        groups = [[run] for run in loaded]
    names = [printable(images.source.name(int(query))) for query in queries]
    classes = images.labels[queries]
    comparisons = [
        {"first": 0, "second": number, **_compare(groups[0], groups[number], names, classes, num_resamples)}
        for number in range(1, len(groups))
    ]
    return {
        "split": loaded[0].split,
        "num_queries": len(queries),
        "num_classes": len(np.unique(classes)),
        "settings": [_describe(group) for group in groups],
        "differing": _differing(groups),
        "comparisons": comparisons,
    }


def _require_same_images(
    path: Path, run_dir: RunDir, first: _Run, are_own: bool, config: Config, images: ImageSet
) -> None:
    """Raises UserError if the images of a run are not those of the first one. Where they are the runs' own, their lists
    of images are compared, too, which have the sizes of the files."""
    changes = ""
    if are_own:
        lists = [ImageList.read(each.images_file) for each in (first.run_dir, run_dir)]
        before, now = (each and each.only(first.split) for each in lists)
        changes = before.differences(now) if before and now else ""
    if changes or first.images.digest() != images.digest():
        raise UserError(
            f"{path} is not evaluated on the images of {first.path}: "
            f"{changes or 'there are others, or other queries'}; give the images to evaluate all runs on (data)"
        )


def _load(path: Path, evaluated: RunEmbeddings, recall_at: Sequence[int]) -> _Run:
    frozen = evaluated.config.cohort.frozen_peers
    of_run = Evaluation.of(evaluated.embeddings, evaluated.images, recall_at=recall_at, teachers=frozen, keep=0)
    values: dict[str, Values] = {name: retrieval.values for name, retrieval in of_run.systems.items()}
    learners = [name for name in evaluated.config.cohort.learners if name in values]
    if learners:
        metrics = values[learners[0]]
        values = {
            MEAN_PEER: {key: np.mean([values[name][key] for name in learners], axis=0) for key in metrics}
        } | values
    settings = settings_without(evaluated.config.model_dump(mode="json"), CHANGES_NO_RESULT)
    seed = tuple(settings.pop(key, None) for key in SEEDS)
    split, images = evaluated.split, evaluated.images
    return _Run(
        path,
        evaluated.run_dir,
        seed,
        settings,
        split,
        images,
        evaluated.weights,
        evaluated.step,
        of_run.queries,
        values,
    )


def _group(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Runs of one setting together, in the order of their first runs."""
    groups: list[list[_Run]] = []
    for run in runs:
        own = next((group for group in groups if group[0].settings == run.settings), None)
        if own is None:
            groups.append([run])
        else:
            own.append(run)
    return groups


def _compare(
    first: Sequence[_Run], second: Sequence[_Run], names: Sequence[str], classes: Ints, num_resamples: int
) -> dict[str, Any]:
    systems = [name for name in first[0].values if all(name in run.values for run in (*first, *second))]
    if not systems:
        raise UserError(f"{first[0].path} and {second[0].path} have no peer in common, and not both an ensemble")
    # Single runs are a pair in any case. Of several ones, those with the same seed are.
    pairs = [(a, b) for a in first for b in second if a.seed == b.seed]
    is_paired = len({a.seed for a, _ in pairs}) == len(pairs) > 0
    if is_paired and len(first) + len(second) > 2:
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found: dict[str, Any] = {}
    compared: dict[str, Any] = {}
    macro: dict[str, Any] = {}
    for system in systems:
        one, other = ([run.values[system] for run in runs] for runs in (first, second))
        for results, is_macro in ((compared, False), (macro, True)):
            differences = compare_values(
                one, other, classes, is_paired=is_paired, macro=is_macro, num_resamples=num_resamples
            )
            results[system] = {metric: difference._asdict() for metric, difference in differences.items()}
        is_found = [np.mean([run["recall@1"] for run in runs], axis=0) > 0.5 for runs in (one, other)]
        found[system] = {
            "first": [names[query] for query in np.flatnonzero(is_found[0] & ~is_found[1]).tolist()],
            "second": [names[query] for query in np.flatnonzero(is_found[1] & ~is_found[0]).tolist()],
        }
    return {"num_pairs": len(pairs) if is_paired else 0, "systems": compared, "macro": macro, "found_only_by": found}


def _describe(group: Sequence[_Run]) -> dict[str, Any]:
    return {
        "runs": [str(run.path) for run in group],
        "seeds": [run.seed[0] for run in group],
        "weights": sorted({run.weights for run in group}),
        "steps": [run.step for run in group],
    }


def _differing(groups: Sequence[Sequence[_Run]]) -> dict[str, list[Any]]:
    """The settings that differ between the groups. Runs of one setting differ in their seeds."""
    settings = [dict(group[0].settings) for group in groups]
    if all(len(group) == 1 for group in groups):
        for each, group in zip(settings, groups, strict=True):
            each |= dict(zip(SEEDS, group[0].seed, strict=True))
    return differing(settings)
