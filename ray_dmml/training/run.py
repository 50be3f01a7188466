"""Starts and resumes runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.checkpoint.store import Checkpoint
from ray_dmml.cohort.cohort import CohortFactory
from ray_dmml.config.differences import WHERE_THINGS_ARE, differing, settings_without
from ray_dmml.config.parts import load_parts
from ray_dmml.config.schema import Config
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.loggers.build import build_loggers
from ray_dmml.loggers.jsonl import JsonlLogger
from ray_dmml.loggers.logger import Logger, Loggers
from ray_dmml.training.image_list import require_same_images
from ray_dmml.training.images import read_images
from ray_dmml.training.run_dir import RunDir
from ray_dmml.training.run_writer import RunWriter
from ray_dmml.training.stop_on_interrupt import StopOnInterrupt
from ray_dmml.training.trainer import Trainer

if TYPE_CHECKING:
    from ray_dmml.checkpoint.remote import RemoteRun

logger = logging.getLogger(__name__)

MAY_CHANGE_ON_RESUME = (
    *WHERE_THINGS_ARE,
    "train.steps",
    "train.log_every",
    "train.evaluate_every",
    "train.early_stopping",
    "checkpoint.*",
    "failure.*",
    "train.tensorboard",
    "train.report",
    "train.pictures",
    "evaluation.*",
    "train.loggers*",
    "cohort.transport",
    "cohort.placement_strategy",
    "cohort.placement_timeout_s",
    "cohort.start_timeout_s",
    "cohort.peers.*.resources*",
    "cohort.peers.*.labels*",
    "cohort.peers.*.checkpoint_activations",
)


def train(
    config: Config | None = None,
    out: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    local: bool = False,
    progress: bool = True,
    loggers: Sequence[Logger] = (),
    should_stop: Callable[[], bool] = lambda: False,
    cohort_factory: CohortFactory | None = None,
) -> dict[str, Any]:
    """Trains a cohort and evaluates it on the test classes, if there are any.

    Args:
        config: the experiment; with ``resume``, None means the run's own.
        out: folder of the new run, which must not exist or be empty. Not with ``resume``.
        resume: folder of a run that goes on from its last checkpoint, or is extended by more ``train.steps``.
        local: all peers in this process, without Ray: the same numbers, more slowly.
        progress: print lines about the run to standard error, in a notebook to the cell. Messages go only through
            Python's :mod:`logging` where the program has set it up.
        loggers: further sinks of metrics, beside metrics.jsonl and TensorBoard in the run's folder.
        should_stop: asked about once a second. When it returns True, the run writes a checkpoint and ends.
        cohort_factory: builds the cohort; None: the one on Ray, or with ``local`` the one in this process.

    Returns:
        The content of ``results.json``. ``untrained``, ``peers`` and ``ensemble`` have figures such as ``recall@1``, as
        fractions; ``weights`` and ``step`` say which weights they are of. A notebook shows it as a table.

    Raises:
        UserError: a setting, a file or the cluster does not allow it; peers were lost more often
            than ``failure.max_failures`` allows; a loss is not finite.
        Interrupted: ``should_stop`` returned True.
        KeyboardInterrupt: Ctrl-C, or the stop button of a notebook. The run stops after its step, with a checkpoint,
            and the message is the call that continues it. A second interrupt does not wait for the step.
    """
    checkpoint: Checkpoint | None = None
    with ExitStack() as stack:
        if resume is None:
            if config is None or out is None:
                raise UserError("a new run needs a config and a folder (out)")
            run_dir = RunDir(Path(out))
            run_dir.ensure_empty()
        else:
            if out is not None:
                raise UserError("resume continues a run in its own folder: give no out")
            run_dir = RunDir.open(resume)
            stack.enter_context(run_dir.lock())
            config = config or run_dir.config()
            if run_dir.checkpoints.index():
                checkpoint = run_dir.checkpoints.load("last", verify=False)  # the peers verify what they read
                _refuse_changes(config, checkpoint, run_dir)
        load_parts(config)
        remote = _open_remote(config, run_dir, is_new=resume is None)
        metrics_file = JsonlLogger(run_dir.metrics_file)
        sinks: list[Logger] = [metrics_file, *loggers, *build_loggers(config, run_dir.path)]
        announce: Callable[[str], object] = logger.info
        if progress:
            from ray_dmml.loggers.progress import show_progress

            display = stack.enter_context(show_progress(config))
            announce = display.print
            sinks.append(display)
        call = f"train(resume={str(run_dir.path)!r}{', local=True' if local else ''})"
        interrupt = stack.enter_context(StopOnInterrupt(run_dir, call, announce, is_new=resume is None))
        sinks.insert(0, interrupt)  # another logger may take its time
        if config.train.tensorboard:
            from ray_dmml.loggers.tensorboard import TensorBoardLogger

            sinks.append(TensorBoardLogger(run_dir.tensorboard))
        if not local and cohort_factory is None:
            from ray_dmml.ray_backend.metrics import RayMetricsLogger

            sinks.append(RayMetricsLogger(run_dir.path.resolve().name, config.train.steps))
        all_loggers = Loggers(sinks)
        stack.callback(all_loggers.close)
        splits = read_images(config)
        if checkpoint is not None:
            require_same_images(run_dir.images_file, splits, run_dir.path)
        trainer = Trainer(
            config,
            run_dir,
            splits,
            cohort_factory or _cohort_class(local),
            initial_weights=_initial_weights(config) if checkpoint is None else None,
            checkpoint=checkpoint,
            writer=RunWriter(run_dir, metrics_file, remote, is_new=resume is None),
            loggers=all_loggers,
            should_stop=lambda: interrupt.should_stop() or should_stop(),
        )
        return trainer.fit()


def _cohort_class(local: bool) -> CohortFactory:
    # Each takes seconds to import, and a run needs one of them.
    if local:
        from ray_dmml.cohort.local import LocalCohort

        return LocalCohort
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    return RayCohort


def _open_remote(config: Config, run_dir: RunDir, *, is_new: bool) -> RemoteRun | None:
    """Where the run is copied to. A resumed run goes on without the copy if that place does not answer."""
    if config.checkpoint.storage_path is None:
        return None
    from ray_dmml.checkpoint.remote import RemoteRun  # imports pyarrow

    try:
        remote = RemoteRun(config.checkpoint.storage_path)
        if is_new:
            remote.ensure_empty()
    except CheckpointError as error:
        if is_new:
            raise
        logger.warning("%s; this run is not copied there", error)
        return None
    return None if remote.is_at(run_dir.path) else remote


def _initial_weights(config: Config) -> Mapping[str, PeerFiles] | None:
    """The best (else the last) weights of the run that this one starts from, by peer name."""
    source = config.train.init_from
    if source is None:
        return None
    store = RunDir.open(source).checkpoints
    peers = store.load("best" if "best" in store.index() else "last").peers
    missing = [str(peer.name) for peer in config.cohort.peers if peer.name not in peers]
    if missing:
        raise UserError(f"train.init_from {source} has no peer {', '.join(missing)}; it has {', '.join(peers)}")
    return {str(peer.name): peers[str(peer.name)] for peer in config.cohort.peers}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]) -> list[str]:
    """What differs between two configs, apart from settings that match the patterns ``may_change``."""
    changes = differing([settings_without(each, may_change) for each in (before, now)])
    return [f"{key} was {old!r} and is {new!r}" for key, (old, new) in sorted(changes.items())]


def _refuse_changes(config: Config, checkpoint: Checkpoint, run_dir: RunDir) -> None:
    """Raises UserError if a resumed run has settings that would change its numbers, or no state to go on from."""
    if not checkpoint.can_be_resumed():
        raise UserError(
            f"{run_dir.path} has ended and kept only its weights (checkpoint.final: weights), so it can be neither "
            f"resumed nor extended; a new run with train.init_from={run_dir.path} starts from its weights"
        )
    changes = changed_settings(checkpoint.meta["config"], config.model_dump(mode="json"), MAY_CHANGE_ON_RESUME)
    if changes:
        raise UserError(
            f"{run_dir.path} cannot be resumed, because its config was changed: {'; '.join(changes)}. Only the number "
            "of steps, what is written and evaluated, and where the images are may change; a new run with "
            f"train.init_from={run_dir.path} starts from its weights"
        )
    if config.train.steps < checkpoint.step:
        raise UserError(
            f"{run_dir.path} cannot be resumed: it has finished {checkpoint.step} steps already, and train.steps is "
            f"{config.train.steps}"
        )
