"""Which images a run is evaluated on, and what results.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.errors import UserError
from ray_dmml.evaluation.evaluation import Evaluation, Figures
from ray_dmml.training.backbones import warn_of_harm

OTHER_IMAGES = "other"
"""The split in results that are not of the run's own images."""

NOT_EVALUATED: Figures = {"peers": {}, "ensemble": {}}


class Results(dict[str, Any]):
    """What results.json holds. As the last value of a notebook's cell it is shown as a table. Further tables show what
    an evaluation was asked for besides, such as classes."""

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        from ray_dmml.loggers.notebook import cell_output
        from ray_dmml.loggers.results_tables import details_tables, results_table

        return cell_output(partial(results_table, self), partial(details_tables, self))


def evaluated_split(config: Config, splits: Splits) -> str | None:
    """The split of the final evaluation: ``test``, ``validation``, or None if all classes were trained on.

    Raises:
        UserError: ``evaluation.split`` names one that there is not.
    """
    there = [split for split in ("test", "validation") if getattr(splits, split) is not None]
    asked = config.evaluation.split
    if asked is not None and asked not in there:
        raise UserError(f"evaluation.split is {asked}, but the data set has no {asked} images")
    return asked or next(iter(there), None)


def evaluate_all(config: Config, embeddings: Mapping[str, np.ndarray], images: ImageSet) -> Evaluation:
    """The evaluation of a run's peers, by their (N, D) unit-length embeddings of the images."""
    recall_at, teachers = config.evaluation.recall_at, config.cohort.frozen_peers
    return Evaluation.of(embeddings, images, recall_at=recall_at, teachers=teachers)


def results_of(
    config: Config,
    split: str | None,
    images: ImageSet | None,
    figures: Figures,
    untrained: Figures,
    weights: str,
    step: int,
) -> Results:
    """What results.json holds: figures, and which weights, images and classes they belong to. ``images`` is None if the
    run is not evaluated. The figures of the untrained peers are left out if they are of another split. A warning is
    added for each peer that ended below its frozen backbone."""
    if untrained.get("split") != split:
        untrained = {}
    query, gallery = (None, None) if images is None else (images.query, images.gallery)
    results = {
        "untrained": untrained.get("peers", {}),
        "untrained_ensemble": untrained.get("ensemble", {}),
        "frozen_backbones": untrained.get("backbones", {}),
        **figures,
        "weights": weights,
        "step": step,
        "split": split,
        "split_by": config.data.split_by,
        "num_classes": None if images is None else images.num_classes,
        "num_images": None if images is None else len(images),
        "num_queries": None if query is None else len(query),
        "num_gallery": None if gallery is None else len(gallery),
        "init_from": str(config.train.init_from) if config.train.init_from else None,
    }
    return Results(results, warnings=[*warn_of_harm(config, results), *figures.get("warnings", ())])
