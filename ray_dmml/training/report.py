"""Writes report.html, at the end of a run and again for runs that exist."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_dmml.atomic_files import replace_file
from ray_dmml.config.parts import load_trusted_parts
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.evaluation.evaluation import Evaluation
from ray_dmml.report.build import RunRecord, build_report
from ray_dmml.report.curves import read_metrics
from ray_dmml.report.page import is_report, render
from ray_dmml.training.evaluate import changed_config, embed_run
from ray_dmml.training.run_dir import RunDir

logger = logging.getLogger(__name__)


def write_report(
    runs: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> Path:
    """Writes the report of a run, or of several side by side, as one HTML file.

    The images are embedded again, in this process. A run that has not ended is shown with its settings and curves. One
    whose images are gone is shown without pictures, with a warning.

    Args:
        runs: their folders.
        out: the file. None: report.html in the folder of the one run. An existing file is replaced if it is a report.
        overrides: ``KEY=VALUE`` that say where the images of the one run are, see
            :func:`~ray_dmml.training.evaluate.changed_config`.
        trust_code: run the own parts that the runs' configs name.

    Returns:
        The file.

    Raises:
        UserError: there is no such run, a checkpoint is damaged, or the file cannot be written.
    """
    folders = [runs] if isinstance(runs, (str, Path)) else list(runs)
    run_dirs = [RunDir.open(folder) for folder in folders]
    if out is None and len(run_dirs) != 1:
        raise UserError(f"a report of {len(run_dirs)} runs needs a file (out)")
    if overrides and len(run_dirs) > 1:
        raise UserError("settings can be changed for the report of one run only")
    file = Path(out) if out is not None else run_dirs[0].report_file
    _ensure_writable(file)
    records = []
    for run_dir in run_dirs:
        config = changed_config(run_dir.path, overrides) if overrides else run_dir.config()
        results = run_dir.results()
        notes: list[str] = []
        evaluation: Evaluation | None = None
        if results is not None and results["split"] is not None:
            evaluation, notes = _evaluate_again(run_dir, config, trust_code)
        records.append(_record(run_dir, config, results, evaluation, notes))
    return _write(file, records)


def write_run_report(
    run_dir: RunDir, config: Config, results: Mapping[str, Any], evaluation: Evaluation | None
) -> Path:
    """Writes report.html of a run that has just ended.

    Args:
        evaluation: of its last evaluation; None: there were no images for one.

    Raises:
        UserError: the file cannot be written.
    """
    return _write(run_dir.report_file, [_record(run_dir, config, results, evaluation, ())])


def _record(
    run_dir: RunDir,
    config: Config,
    results: Mapping[str, Any] | None,
    evaluation: Evaluation | None,
    notes: Sequence[str],
) -> RunRecord:
    metrics = read_metrics(run_dir.metrics_file)
    return RunRecord(run_dir.path, config, run_dir.environment(), metrics, results, evaluation, tuple(notes))


def _evaluate_again(run_dir: RunDir, config: Config, trust_code: bool) -> tuple[Evaluation | None, list[str]]:
    """What the peers find. If the images are gone or have changed, there is a note instead."""
    load_trusted_parts(config, run_dir.path, trust_code, "--trust-code, or trust_code=True in Python")
    # Raises if it is damaged: then the images are not to blame.
    run_dir.checkpoints.load("best" if config.weights_to_evaluate() == "best" else "last")
    try:
        return embed_run(run_dir.path, config=config, trust_code=trust_code).evaluation(), []
    except UserError as error:
        note = f"There are no pictures: {error}."
        logger.warning("the report of %s has no pictures: %s", run_dir.path, error)
        return None, [note]


def _write(file: Path, records: Sequence[RunRecord]) -> Path:
    logger.debug("writing the report")
    text = render(build_report(records, made=datetime.now()))
    _ensure_writable(file)
    # A path may hold bytes that are no text.
    replace_file(file, text.encode("utf-8", "backslashreplace"))
    return file


def _ensure_writable(file: Path) -> None:
    """Raises UserError if the file is not a report, or cannot be written."""
    advice = "give another file (out)"
    try:
        with file.open("rb") as opened:
            if not is_report(opened.read(2000)):
                raise UserError(f"{file} exists and is not a report of ray-dmml; {advice}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"the report {file} cannot be written: {error.strerror}; {advice}") from None
    aside = file.with_name(file.name + ".tmp")
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise UserError(f"the report {file} cannot be written: {error.strerror}; {advice}") from None
