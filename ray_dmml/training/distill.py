"""Distillation: one student learns from the frozen peers of a finished run, or from another trained net.

It is a run like any other. This module only writes its config: the data and the metric loss of the first run, a
student, frozen peers that teach, and relational distillation with the concatenated embeddings of all teachers as one
teacher. Checkpoints hold the weights of frozen peers, so the run is resumed and used without the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_dmml.checkpoint.store import read_checkpoint
from ray_dmml.config.loading import BUILT_IN_WEIGHTS, Overrides
from ray_dmml.config.parts import load_trusted_parts, own_names
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.image_list import ImageList
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir
from ray_dmml.training.state import TrainingState

RELATIONAL = {"teacher": "others", "normalize": False, "distance_weight": 4.0, "angle_weight": 8.0}
"""`loss.relational` of a distillation. The weights are higher than between peers, because this teacher is trained."""

_OF_A_BACKBONE = ("backbone_args", "pooling", "freeze_blocks", "lora")
"""Settings of a peer that may not fit another backbone."""

_OF_DIVERSITY = ("update_interval", "update_mode", "init_seed")
"""Settings of a peer that make it differ from others, which one student needs not."""

_OF_A_TEACHER = (
    *("name", "seed", "backbone", "backbone_args", "pooling"),
    *("input_size", "eval_crop", "amp", "channels_last"),
)
"""Settings of a peer that its embeddings depend on."""


def distill(
    run: Path | str | None,
    student: str,
    out: Path | str,
    *,
    local: bool = False,
    progress: bool = True,
    loggers: Sequence[Logger] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Trains one student that learns from a finished run's peers, frozen, and from labels.

    Args:
        run: folder of the run whose peers teach; None: another ``teacher`` does.
        student: backbone of the student, as `cohort.peers.*.backbone`.
        out: folder of the new run.
        local: as in :func:`~ray_dmml.training.run.train`.
        progress: as in :func:`~ray_dmml.training.run.train`.
        loggers: as in :func:`~ray_dmml.training.run.train`.
        settings: the other arguments of :func:`distillation_config`, such as ``teacher`` and ``overrides``.

    Returns:
        The same as :func:`~ray_dmml.training.run.train`. ``peers`` has the student first and then its teachers;
        ``teachers_ensemble`` is the ensemble of several teachers, ``ensemble`` that of all with the student.

    Raises:
        UserError: as :func:`distillation_config` and :func:`~ray_dmml.training.run.train`; or the images, or their
            splits, are not those that the teachers were trained with.
    """
    config = distillation_config(run, student, **settings)
    if run is not None:
        require_images_of(run, config)
    return train(config, out, local=local, progress=progress, loggers=loggers)


def distillation_config(
    run: Path | str | None,
    student: str,
    *,
    weights: str | None = None,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    teacher_view: str = "evaluation",
    config: Config | None = None,
    alone: bool = False,
    overrides: Overrides = (),
    trust_code: bool = False,
) -> Config:
    """The config of a distillation. The student is its first peer, and its teachers are the frozen peers after it.

    The student has the settings of the run's first peer that learns, and the embedding size of its largest. Settings
    that belong to a backbone (pooling, frozen blocks, adapters, a file of weights) are kept for the same backbone only.
    A cosine schedule that ends with the run's last step ends with the student's, whatever `train.steps` overrides set.

    Args:
        run: folder of the run whose peers teach; None: ``teacher`` does.
        student: backbone of the student.
        weights: initial weights of the student; None: those of the run's first peer.
        teacher: a model of timm that teaches in place of a run, as `cohort.peers.*.backbone`.
        teacher_weights: weights of ``teacher``: ``pretrained``, ``offline`` or a file; None: ``pretrained``.
        teacher_view: what teachers embed, ``own`` or ``evaluation``, as `cohort.peers.*.teacher_view`.
        config: with ``teacher``, the experiment.
        alone: leave the teachers out, to train the same student for comparison.
        overrides: changes of the new config, as in :meth:`~ray_dmml.config.schema.Config.with_overrides`.
        trust_code: run the own parts that the run's config names.

    Raises:
        UserError: there is no such run, it has not finished, its checkpoint is damaged, a setting is not allowed, or
            the run has own parts and ``trust_code`` is False.
    """
    if (run is None) == (teacher is None):
        raise UserError("a student learns from a finished run or from another teacher: give one of the two")
    if run is None:
        if config is None:
            raise UserError("a teacher that is not of a run needs a config, which names the images and the loss")
        teachers = [{"name": "teacher", "seed": 1, "backbone": teacher, "weights": teacher_weights or "pretrained"}]
        return _config(config, student, weights, teachers, teacher_view, alone, overrides)
    if config is not None:
        raise UserError("a distillation of a run has the config of the run, which only overrides (--set) change")
    if teacher_weights is not None:
        raise UserError("teacher_weights are those of another teacher (teacher); the peers of a run have their own")
    run_dir = RunDir.open(run)
    own = run_dir.config()
    made = _config(own, student, weights, _teachers(run_dir, own, teacher_view), teacher_view, alone, overrides)
    load_trusted_parts(made, run_dir.path, trust_code, "--trust-code, or trust_code=True in Python")
    # Code that nothing names any more is not even made importable.
    return made if own_names(made) else made.model_copy(update={"code": ()})


def require_images_of(run: Path | str, config: Config) -> None:
    """Raises UserError if the images of a distillation are not those of the run, or in other splits: the teachers might
    have been trained on what would be a test image now."""
    run_dir = RunDir.open(run)
    skip = frozenset(run_dir.environment().get("skipped_images", ()))
    splits = load_splits(config.data, skip=skip, check=False)
    before = ImageList.read(run_dir.images_file)
    if before is not None and (changes := before.differences(ImageList.of(splits))):
        raise UserError(
            f"the images of {run_dir.path} have changed: {changes}; a student needs the images and splits that its "
            "teachers were trained with (data.root may name another folder of them)"
        )


def _teachers(run_dir: RunDir, config: Config, view: str) -> list[dict[str, Any]]:
    """Settings of the peers of a finished run as teachers, with the weights that the run's results are of."""
    store = run_dir.checkpoints
    index = store.index()
    last = read_checkpoint(store.path("last")) if index else None
    if last is None or not TrainingState.of(last).is_over(config):
        raise UserError(
            f"{run_dir.path} has not finished: it has made {last.step if last else 0} of {config.train.steps} steps; "
            f"ray-dmml train --resume {run_dir.path} goes on with it"
        )
    which = config.weights_to_evaluate()
    checkpoint = read_checkpoint(store.path("best")) if which == "best" and "best" in index else last
    teachers = []
    for peer in config.cohort.peers:
        if (name := str(peer.name)) in last.meta["dropped"]:
            continue
        is_averaged = which == "ema" and "ema.safetensors" in checkpoint.peers[name]
        file = checkpoint.path / name / ("ema.safetensors" if is_averaged else "weights.safetensors")
        settings = peer.model_dump(mode="json", include={*_OF_A_TEACHER, *(["view"] if view == "own" else [])})
        teachers.append({**settings, "weights": str(file.resolve())})
    return teachers


def _config(
    config: Config,
    student: str,
    weights: str | None,
    teachers: Sequence[dict[str, Any]],
    teacher_view: str,
    alone: bool,
    overrides: Overrides,
) -> Config:
    """The config with another cohort. Relative paths are relative to the current folder."""
    raw = config.model_dump(mode="json")
    learner = _student(config, student, weights, teachers)
    frozen = [{**teacher, "frozen": True, "teacher_view": teacher_view} for teacher in teachers]
    raw["cohort"] |= {"peers": [learner, *frozen], "max_teachers": None}
    raw["loss"] = {"metric": raw["loss"]["metric"], "relational": RELATIONAL}
    raw["train"] |= {"init_from": None, "monitor": "mean_peer"}
    raw["checkpoint"]["storage_path"] = None  # there is room for one run
    if raw["evaluation"]["weights"] == "ema" and learner["ema"] is None:
        raw["evaluation"]["weights"] = None
    overrides = overrides if isinstance(overrides, (str, Mapping)) else list(overrides)  # they are read twice
    made = Config.parse(raw, source="the distillation").with_overrides(overrides)
    if learner["schedule"]["steps"] == config.train.steps != made.train.steps:
        learner["schedule"]["steps"] = made.train.steps
        made = Config.parse(raw, source="the distillation").with_overrides(overrides)
    if alone:
        cohort = made.cohort.model_copy(update={"peers": made.cohort.peers[:1]})
        made = made.model_copy(update={"cohort": cohort})
    return made


def _student(config: Config, backbone: str, weights: str | None, teachers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings of the student, with a name and a seed that no teacher has."""
    learners = [peer for peer in config.cohort.peers if not peer.frozen]
    like = learners[0]
    left_out = _OF_DIVERSITY if backbone == like.backbone else (*_OF_DIVERSITY, *_OF_A_BACKBONE)
    settings = like.model_dump(mode="json", exclude={*left_out})
    names, seeds = ({teacher[key] for teacher in teachers} for key in ("name", "seed"))
    numbers = range(len(teachers) + 1)
    return settings | {
        "name": next(name for n in numbers if (name := f"student{n or ''}") not in names),
        "seed": next(seed for seed in numbers if seed not in seeds),
        "backbone": backbone,
        "weights": weights or _weights_like(like, backbone),
        "embedding_size": max(peer.embedding_size for peer in learners),
    }


def _weights_like(peer: PeerConfig, backbone: str) -> str:
    """The initial weights of a peer, for a backbone that the file of another does not fit."""
    return peer.weights if peer.weights in BUILT_IN_WEIGHTS or backbone == peer.backbone else "pretrained"
