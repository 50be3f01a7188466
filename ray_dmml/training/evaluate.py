"""Evaluates a checkpoint of a run again: on the run's own images, or on others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_dmml import pushed
from ray_dmml.checkpoint.store import STEP_FOLDER, read_checkpoint
from ray_dmml.config.differences import WHERE_THINGS_ARE
from ray_dmml.config.parts import load_trusted_parts
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.data.datasets import load_images, load_splits
from ray_dmml.data.findings import Findings
from ray_dmml.data.staging import local_root
from ray_dmml.errors import UserError
from ray_dmml.evaluation import details
from ray_dmml.evaluation.evaluation import Evaluation, Figures, warn_of_small_gallery
from ray_dmml.training.embeddings_file import require_columns, require_new, write_embeddings
from ray_dmml.training.image_list import ImageList, Row, some_names
from ray_dmml.training.results import OTHER_IMAGES, Results, evaluate_all, evaluated_split, results_of
from ray_dmml.training.run import changed_settings
from ray_dmml.training.run_dir import RunDir

logger = logging.getLogger(__name__)

MAY_CHANGE = (*WHERE_THINGS_ARE, "evaluation.*", "data.exclude_same", "data.on_bad_image", "data.check_images")
"""Settings of a run that its evaluation may change."""

_UNKNOWN = [Row("", "", f"(unknown {number})", "training") for number in (1, 1, 2, 2)]
"""Stands for the training images of a pushed cohort, which does not name them. A cohort cannot be built without any."""


@dataclass(frozen=True, eq=False)
class RunEmbeddings:
    """The images that a run is evaluated on, as its peers embed them.

    Attributes:
        run_dir: the run.
        config: its config, with another place of the images where that was asked for, and without dropped peers.
        split: ``test``, ``validation``, or ``other`` for other images than the run's own.
        images: the N images.
        embeddings: (N, D) float32 of each peer, rows of length 1.
        weights: ``last``, ``best`` or ``ema``; ``checkpoint`` for the last weights of a checkpoint that was given.
        step: the step of the checkpoint.
        untrained: the figures of the untrained peers and of the frozen backbones, which the run itself has measured.
        place: where the images are; None if neither ``data`` nor ``config`` was given.
    """

    run_dir: RunDir
    config: Config
    split: str
    images: ImageSet
    embeddings: dict[str, np.ndarray]
    weights: str
    step: int
    untrained: Figures
    place: str | None

    def evaluation(self) -> Evaluation:
        """What each peer and the ensemble retrieve."""
        return evaluate_all(self.config, self.embeddings, self.images)

    def results(self, figures: Mapping[str, Any]) -> Results:
        """``figures`` and what they are of, in the form of results.json."""
        results = results_of(
            self.config, self.split, self.images, dict(figures), self.untrained, self.weights, self.step
        )
        for line in results["warnings"]:
            logger.warning("%s", line)
        if self.place is not None:
            results["data"] = self.place
        return results


def embed_run(
    run: Path | str,
    weights: str | None = None,
    *,
    data: Path | str | None = None,
    config: Config | None = None,
    trust_code: bool = False,
    check: Callable[[Config, ImageSet], None] | None = None,
) -> RunEmbeddings:
    """Embeds the images that a run is evaluated on, or others, in this process. It writes nothing.

    Args:
        run: its folder, the folder of one of its checkpoints, or a pushed cohort (with ``data`` only): a folder that
            ``ray-dmml push`` wrote, or ``hf-hub:OWNER/NAME``.
        weights: ``last``, ``best`` (on validation classes) or ``ema`` (of the last checkpoint); None: those
            of the run's own results. A checkpoint has ``last`` (the default) and ``ema``.
        data: other images: a folder with one folder a class, or a CSV file (a manifest, whose paths are relative to its
            folder). All classes of the folder, and all rows of the manifest or those of split ``validation`` if there
            are any, are evaluated. None: the run's own images.
        config: the run's config with another place of its images, or other settings of ``evaluation``; None: unchanged.
        trust_code: run the own parts that the run's config names.
        check: is called with the config and the images before they are embedded, and may raise UserError.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, its images are gone or have changed, all of them
            were trained on, or it has own parts and ``trust_code`` is False.
    """
    run_dir, checkpoint_folder = open_run(run, trust_code)
    is_unchanged = data is None and config is None
    config = config or run_dir.config()
    load_trusted_parts(config, run_dir.path, trust_code, "--trust-code, or trust_code=True in Python")
    source = _read_weights(run_dir, checkpoint_folder, config, weights)
    if data is None:
        split, splits = _own_images(config, run_dir)
    else:
        config = config.model_copy(update={"data": _data_config(config.data, Path(data))})
        split, splits = OTHER_IMAGES, _other_images(config, run_dir)
    which = "test" if split == OTHER_IMAGES else split
    images: ImageSet = getattr(splits, which)
    place = None if is_unchanged else _place(config.data)
    config = _without_peers(config, source.dropped, run_dir)
    if check is not None:
        check(config, images)
    # The run has measured the untrained peers with other matches.
    untrained = source.untrained if config.data.exclude_same == run_dir.config().data.exclude_same else {}
    logger.debug("embedding %s images with the peers of %s", f"{len(images):,}", run_dir.path)
    embeddings = _embed(config, splits, which, source)
    return RunEmbeddings(run_dir, config, split, images, embeddings, source.weights, source.step, untrained, place)


def evaluate(
    run: Path | str,
    weights: str | None = None,
    *,
    data: Path | str | None = None,
    config: Config | None = None,
    trust_code: bool = False,
    per_class: bool = False,
    clustering: bool = False,
    subsets: bool = False,
    embeddings: Path | str | None = None,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint again, in this process. It writes nothing but ``embeddings``.

    Args:
        run: its folder, the folder of one of its checkpoints, or a pushed cohort (with ``data`` only): a folder that
            ``ray-dmml push`` wrote, or ``hf-hub:OWNER/NAME``.
        weights: ``last``, ``best`` (on validation classes) or ``ema`` (averaged weights of the last checkpoint). None:
            those of the run's own results. A checkpoint has ``last`` (the default) and ``ema``.
        data: other images: a folder with one folder a class, or a CSV file (a manifest, whose paths are relative to its
            folder). All classes of the folder, and all rows of the manifest or those of split ``validation`` if there
            are any, are evaluated. None: the run's own images.
        config: the run's config with another place of its images, or other settings of ``evaluation``; None: unchanged.
        trust_code: run the own parts that the run's config names.
        per_class: also give the figures of each class, and of each category of a manifest, the worst first.
        clustering: also give NMI and AMI of k-means clusters.
        subsets: also give the figures of the ensemble of every subset of the peers.
        embeddings: a new Parquet file for the embeddings: a row for each image, with its name, class and the
            embedding of each peer.

    Returns:
        The same as :func:`~ray_dmml.training.run.train`. With ``data``, ``split`` is ``other``. With ``data``, or if
        ``data.exclude_same`` has changed, figures of the untrained peers are left out. With ``data`` or ``config``
        there is also ``data``, where the images are. ``per_class`` adds ``classes`` and ``categories``, and
        ``clustering`` and ``subsets`` add entries of their names.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, its images are gone or have changed, all of them
            were trained on, or it has own parts and ``trust_code`` is False; a K of ``evaluation.recall_at`` is not
            below the number of images that a query is compared with; ``embeddings`` exists or cannot be written; or the
            peers are too many for ``subsets``.
    """
    if embeddings is not None:
        require_new(Path(embeddings))

    def check(config: Config, images: ImageSet) -> None:  # before minutes of embedding
        for problem in warn_of_small_gallery(images, config.evaluation.recall_at):
            raise UserError(problem)
        if embeddings is not None:
            require_columns([str(peer.name) for peer in config.cohort.peers])
        if subsets:
            details.require_few(len(config.cohort.peers))

    embedded = embed_run(run, weights, data=data, config=config, trust_code=trust_code, check=check)
    evaluation = embedded.evaluation()
    if embeddings is not None:
        write_embeddings(Path(embeddings), evaluation.images, evaluation.embeddings)
    figures = evaluation.summary()
    if per_class:
        figures |= {"classes": details.by_class(evaluation), "categories": details.by_category(evaluation)}
    if clustering:
        figures["clustering"] = details.clustering(evaluation)
    if subsets:
        figures["subsets"] = details.subsets(evaluation)
    return embedded.results(figures)


def changed_config(run: Path | str, overrides: Iterable[str]) -> Config:
    """The config of a run with ``KEY=VALUE`` overrides, for :func:`evaluate`.

    Raises:
        UserError: there is no such run, or an override changes more than where the images are and how they are
            evaluated.
    """
    run_dir, _ = open_run(run, trust_code=False)
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
    if pushed.is_pushed(run_dir.path):
        raise UserError(f"{run_dir.path} is a pushed cohort, which has no images: give images to evaluate it on (data)")
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
    trained = ImageList(_UNKNOWN) if pushed.is_pushed(run_dir.path) else ImageList.read(run_dir.images_file)
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
        # No batch is drawn, so the training images need not be enough for one.
        "classes_per_batch": 2,
        "images_per_class": 2,
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


@dataclass(frozen=True)
class _Source:
    """Weights to evaluate, and what is known of them."""

    weights: str
    step: int
    peers: Mapping[str, Mapping[str, bytes]]
    untrained: Figures
    dropped: Collection[str]
    uses_ema: bool


def open_run(place: Path | str, trust_code: bool) -> tuple[RunDir, Path | None]:
    """The run, or pushed cohort, and the folder of the checkpoint if ``place`` is one of a run."""
    path = Path(place).absolute()
    if STEP_FOLDER.fullmatch(path.name) and path.parent.name == "checkpoints":
        return RunDir.open(path.parents[1]), path
    return RunDir.open(pushed.fetch(place, code=trust_code)), None


def _read_weights(run_dir: RunDir, folder: Path | None, config: Config, weights: str | None) -> _Source:
    """The weights of a run, of one of its checkpoints (``folder``), or of a pushed cohort."""
    if pushed.is_pushed(run_dir.path):
        which = config.weights_to_evaluate(weights)
        files = pushed.read_weights(run_dir.path, [str(peer.name) for peer in config.cohort.peers], which)
        peers = {name: {pushed.WEIGHTS_FILE: content} for name, content in files.items()}
        return _Source(which, pushed.step(run_dir.path), peers, {}, (), uses_ema=False)
    if folder is not None:
        if weights == "best":
            raise UserError(f"{folder} is one checkpoint; give the run, {run_dir.path}, to evaluate its best weights")
        which = config.weights_to_evaluate(weights or "last")
        checkpoint = read_checkpoint(folder)
    else:
        which = config.weights_to_evaluate(weights)
        checkpoint = run_dir.checkpoints.load("best" if which == "best" else "last")
    # Dropped peers are left out, as in the run's own results.
    last = run_dir.checkpoints.load("last", verify=False) if which == "best" else checkpoint
    name = "checkpoint" if folder is not None and which == "last" else which
    untrained, dropped = checkpoint.meta["untrained"], last.meta["dropped"]
    return _Source(name, checkpoint.step, checkpoint.peers, untrained, dropped, uses_ema=which == "ema")


def _embed(config: Config, splits: Splits, split: str, source: _Source) -> dict[str, np.ndarray]:
    from ray_dmml.cohort.local import LocalCohort  # its import takes seconds, which an error should not wait for

    with closing(LocalCohort(config, splits, initial_weights=False)) as cohort:
        cohort.load(source.peers)
        return cohort.embeddings(split, ema=source.uses_ema)
