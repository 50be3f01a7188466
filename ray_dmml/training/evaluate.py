"""Evaluates a checkpoint of a run again: on the run's own images, or on others."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from ray_dmml.checkpoint.store import Checkpoint
from ray_dmml.config.parts import load_trusted_parts
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.data.datasets import load_images, load_splits
from ray_dmml.data.findings import Findings
from ray_dmml.data.staging import local_root
from ray_dmml.errors import UserError
from ray_dmml.evaluation.evaluate import evaluate_embeddings
from ray_dmml.training.image_list import ImageList, some_names
from ray_dmml.training.results import OTHER_IMAGES, evaluated_split, results_of
from ray_dmml.training.run import WHERE_THINGS_ARE, changed_settings
from ray_dmml.training.run_dir import RunDir

logger = logging.getLogger(__name__)

MAY_CHANGE = (*WHERE_THINGS_ARE, "evaluation.*", "data.on_bad_image", "data.check_images")
"""Settings of a run that its evaluation may change."""


def evaluate(
    run: Path | str,
    weights: str | None = None,
    *,
    data: Path | str | None = None,
    config: Config | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint again, in this process. It writes nothing.

    Args:
        run: its folder.
        weights: ``last``, ``best`` (on validation classes) or ``ema`` (of the last checkpoint); None: those
            of the run's own results.
        data: other images: a folder with one folder a class, or a CSV file (a manifest, whose paths are relative to its
            folder). All classes of the folder, and all rows of the manifest or those of split ``validation`` if there
            are any, are evaluated. None: the run's own images.
        config: the run's config with another place of its images, or other settings of ``evaluation``; None: unchanged.
        trust_code: run the own parts that the run's config names.

    Returns:
        The same as :func:`~ray_dmml.training.run.train`. With ``data``, ``split`` is ``other``, and figures of the
        untrained peers are left out. With ``data`` or ``config`` there is also ``data``, where the images are.

    Raises:
        UserError: there is no such run or checkpoint, its images are gone or have changed, all of them were trained
            on, or it has own parts and ``trust_code`` is False.
    """
    run_dir = RunDir.open(run)
    is_unchanged = data is None and config is None
    config = config or run_dir.config()
    load_trusted_parts(config, run_dir.path, trust_code, "--trust-code, or trust_code=True in Python")
    weights = config.weights_to_evaluate(weights)
    checkpoint = run_dir.checkpoints.load("best" if weights == "best" else "last")
    if data is None:
        split, splits = _own_images(config, run_dir)
    else:
        config = config.model_copy(update={"data": _data_config(config.data, Path(data))})
        split, splits = OTHER_IMAGES, _other_images(config, run_dir)
    which = "test" if split == OTHER_IMAGES else split
    images: ImageSet = getattr(splits, which)
    # Dropped peers are left out, as in the run's own results.
    last = checkpoint if weights != "best" else run_dir.checkpoints.load("last")
    config = _without_peers(config, last.meta["dropped"], run_dir)
    embeddings = _embed(config, splits, which, checkpoint, ema=weights == "ema")
    figures = evaluate_embeddings(embeddings, images, config.evaluation.recall_at, config.cohort.frozen_peers)
    results = results_of(config, split, images, figures, checkpoint.meta["untrained"], weights, checkpoint.step)
    return results if is_unchanged else {**results, "data": _place(config.data)}


def changed_config(run: Path | str, overrides: Iterable[str]) -> Config:
    """The config of a run with ``KEY=VALUE`` overrides, for :func:`evaluate`.

    Raises:
        UserError: there is no such run, or an override changes more than where the images are and how they are
            evaluated.
    """
    run_dir = RunDir.open(run)
    before, now = run_dir.config(), Config.load(run_dir.config_file, overrides)
    if changes := changed_settings(before.model_dump(mode="json"), now.model_dump(mode="json"), MAY_CHANGE):
        raise UserError(
            f"an evaluation of {run_dir.path} cannot change how it was trained: {'; '.join(changes)}; allowed: "
            f"{', '.join(MAY_CHANGE)}"
        )
    return now


def images_to_evaluate(config: Config, run_dir: RunDir, data: Path | str | None = None) -> tuple[str, ImageSet]:
    """The split that a run is evaluated on and its images, or other images (``data``), see :func:`evaluate`.

    Raises:
        UserError: they are gone or have changed, or all of them were trained on.
    """
    if data is None:
        split, splits = _own_images(config, run_dir)
        return split, getattr(splits, split)
    config = config.model_copy(update={"data": _data_config(config.data, Path(data))})
    return OTHER_IMAGES, load_images(config.data, Findings())


def _own_images(config: Config, run_dir: RunDir) -> tuple[str, Splits]:
    """The split that the run itself is evaluated on, and its images."""
    skip = frozenset(run_dir.environment().get("skipped_images", ()))
    splits = load_splits(config.data, skip=skip, check=False)
    split = evaluated_split(config, splits)
    advice = "give other images to evaluate it on (data)"
    if split is None:
        raise UserError(f"{run_dir.path} has nothing to be evaluated on: all its images were trained on; {advice}")
    before = ImageList.read(run_dir.images_file)
    if before is not None and (changes := before.only(split).differences(ImageList.of(splits).only(split))):
        raise UserError(f"the {split} images of {run_dir.path} have changed: {changes}; {advice}")
    return split, splits


def _other_images(config: Config, run_dir: RunDir) -> Splits:
    """Images that the run does not know, as test images. Warns if it knows some of them."""
    trained = ImageList.read(run_dir.images_file)
    if trained is None:
        raise UserError(f"{run_dir.path} has no readable images.csv.gz, which names its training classes")
    findings = Findings()
    images = load_images(config.data, findings)
    for note in findings.notes:
        logger.warning("%s", note)
    splits = Splits(trained.training_set(), None, images)
    known = {(row.name, row.size) for row in trained.only("training").rows}
    if again := [row.name for row in ImageList.of(splits).only("test").rows if (row.name, row.size) in known]:
        logger.warning("%d of the images were trained on (%s)", len(again), some_names(again))
    labels = set(splits.train.class_names)
    if both := [name for name in images.class_names if name in labels]:
        logger.warning("%d classes have the name of a class that was trained on (%s)", len(both), some_names(both))
    return splits


def _data_config(own: DataConfig, place: Path) -> DataConfig:
    """The settings for other images, decoded as the run's own."""
    if not os.path.exists(place):
        raise UserError(f"the images to evaluate, {place}, do not exist")
    is_manifest = os.path.isfile(place)
    update = {
        "name": "manifest" if is_manifest else "imagefolder",
        "root": place.absolute().parent if is_manifest else place.absolute(),
        "manifest": place.absolute() if is_manifest else None,
        "source": None,
        "check_images": True,
    }
    return own.model_copy(update=update)


def _place(data: DataConfig) -> str:
    """Where images are, for a person."""
    if data.root is None and data.source is None:
        return data.name
    return f"{data.manifest} in {local_root(data)}" if data.name == "manifest" else str(local_root(data))


def _without_peers(config: Config, dropped: Collection[str], run_dir: RunDir) -> Config:
    """The config without these peers, with the torch threads that the run had."""
    threads = max(run_dir.environment().get("threads") or [0]) or None
    peers = tuple(peer for peer in config.cohort.peers if peer.name not in dropped)
    update = {"threads_per_peer": threads, "peers": peers}
    return config.model_copy(update={"cohort": config.cohort.model_copy(update=update)})


def _embed(config: Config, splits: Splits, split: str, checkpoint: Checkpoint, *, ema: bool) -> dict[str, Any]:
    from ray_dmml.cohort.local import LocalCohort  # its import takes seconds, which an error should not wait for

    with closing(LocalCohort(config, splits, initial_weights=False)) as cohort:
        cohort.load(checkpoint.peers)
        return cohort.embeddings(split, ema=ema)
