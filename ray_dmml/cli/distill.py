"""``ray-dmml distill``"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ray_dmml.cli.lifecycle import Interruptible
from ray_dmml.cli.options import (
    Address,
    AsJson,
    NewRun,
    Overrides,
    TrainLocally,
    TrustCode,
    not_empty,
    path,
    use_address,
)
from ray_dmml.cli.output import show_log, user_errors
from ray_dmml.cli.train import default_folder, train_and_show
from ray_dmml.loggers.output import Console

TeacherView = StrEnum("TeacherView", ["own", "evaluation"])


def distill(
    student: Annotated[
        str, typer.Option(parser=not_empty, metavar="BACKBONE", help="Backbone of the student, such as resnet18.")
    ],
    run: Annotated[
        Path | None, typer.Argument(parser=path, metavar="[RUN]", help="Folder of a finished run, whose peers teach.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            parser=not_empty,
            metavar="none|pretrained|offline|FILE",
            help="Initial weights of the student. Default: as RUN's first peer.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            parser=not_empty, metavar="BACKBONE", help="A trained model of timm that teaches in place of RUN."
        ),
    ] = None,
    teacher_weights: Annotated[
        str | None,
        typer.Option(
            parser=not_empty, metavar="pretrained|offline|FILE", help="Weights of --teacher. Default: pretrained."
        ),
    ] = None,
    teacher_view: Annotated[
        TeacherView,
        typer.Option(
            metavar="own|evaluation",
            help="What teachers embed: their own view of each batch, or the evaluation view of each image, once. "
            "Default: evaluation.",
            show_default=False,
        ),
    ] = TeacherView.evaluation,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", parser=path, metavar="FILE", help="With --teacher: the YAML config."),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Train the same student without teachers, for comparison.")
    ] = False,
    overrides: Overrides = None,
    out: NewRun = None,
    trust_code: TrustCode = False,
    address: Address = None,
    local: TrainLocally = False,
    as_json: AsJson = False,
) -> None:
    """Train one student that learns from the frozen peers of a finished run: one net for the work of several.

    It is a run like others: `ray-dmml train --resume` continues it, `ray-dmml evaluate` evaluates it.
    """
    console, began = Console(stderr=as_json), time.monotonic()
    use_address(address)
    with user_errors(), Interruptible(console) as signals, show_log(console):
        from ray_dmml.config.schema import Config
        from ray_dmml.training.distill import distillation_config, require_images_of
        from ray_dmml.training.quick_check import check_quickly
        from ray_dmml.training.run_dir import RunDir

        settings = distillation_config(
            run,
            student,
            weights=weights,
            teacher=teacher,
            teacher_weights=teacher_weights,
            teacher_view=teacher_view.value,
            config=Config.load(config) if config else None,
            alone=alone,
            overrides=overrides or (),
            trust_code=trust_code,
        )
        folder = out or default_folder(settings)
        RunDir(folder).ensure_empty()  # before anything takes time
        check_quickly(settings, on_this_machine=local or "RAY_ADDRESS" not in os.environ)
        if run is not None:
            require_images_of(run, settings)
        train_and_show(settings, folder, console, signals, began, local=local, as_json=as_json)
