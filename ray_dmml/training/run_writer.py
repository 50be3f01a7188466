"""Writes the files of a run, and decides what a full disk or a storage that does not answer means for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_dmml.checkpoint.store import WritePeers
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import Splits
from ray_dmml.errors import CheckpointError
from ray_dmml.loggers.jsonl import JsonlLogger
from ray_dmml.training.image_list import ImageList
from ray_dmml.training.run_dir import RunDir

if TYPE_CHECKING:
    from ray_dmml.checkpoint.remote import RemoteRun

logger = logging.getLogger(__name__)

RETRY_S = 60.0
"""Seconds for which the run tries again to write what comes after its last step."""


class RunWriter:
    """The writing side of a run's folder, and of its copy at ``remote``. The folder of a new run is made and locked by
    :meth:`open`; that of a resumed one is already locked."""

    def __init__(self, run_dir: RunDir, metrics_file: JsonlLogger, remote: RemoteRun | None, *, is_new: bool) -> None:
        self._run_dir, self._metrics_file, self._remote = run_dir, metrics_file, remote
        self._is_new = is_new
        self._lock = ExitStack()

    def open(self) -> None:
        """Creates and locks the folder of a new run."""
        run_dir = self._run_dir
        if self._is_new:  # another run may have taken the folder while the peers started
            run_dir.create()
            self._lock.enter_context(run_dir.lock())
            run_dir.ensure_empty()
            self._is_new = False

    def write_facts(self, config: Config, splits: Splits, facts: Mapping[str, Any]) -> None:
        """Writes config.yaml, images.csv.gz, and ``facts`` into run.json."""
        run_dir = self._run_dir
        run_dir.write_config(config)
        before = run_dir.environment()
        code, threads = before.get("code", {}), before.get("threads")
        changed = [file for file in code if code[file] != facts["code"].get(file)]
        if changed:
            logger.warning("%s: changed since the run started, so its numbers may differ", ", ".join(changed))
        if threads not in (None, facts["threads"]):
            logger.warning(
                "the peers have %s torch threads and had %s: the last bits may differ from an undisturbed run "
                "(cohort.threads_per_peer sets them)",
                facts["threads"],
                threads,
            )
        try:
            run_dir.write_environment(**facts)
            ImageList.of(splits).write(run_dir.images_file)
        except CheckpointError as error:
            logger.warning("%s; training goes on", error)

    def save(
        self,
        step: int,
        write_peers: WritePeers,
        meta: Mapping[str, Any],
        *,
        best: bool,
        is_last: bool,
    ) -> bool:
        """Writes a checkpoint and copies the run.

        Returns False if it cannot be written now: the steps are worth more than their checkpoint, and the next one
        may find room again. For the first and the last checkpoint that is a CheckpointError.
        """

        def write() -> None:
            self._metrics_file.write(sync=True)  # no checkpoint is ahead of the metrics
            self._run_dir.checkpoints.save(step, write_peers, meta, best=best)

        if step == 0:
            write()
        elif is_last:
            retry_write(write)
        else:
            try:
                write()
            except CheckpointError as error:
                logger.warning("%s; training goes on", error)
                return False
        self._copy_to_remote()
        return True

    def write_metrics(self) -> None:
        retry_write(self._metrics_file.write)

    def write_results(self, results: dict[str, Any], *, keep_state: bool) -> None:
        """Writes results.json, the last file of a run, and then removes what only resuming needs, if it is unwanted."""
        retry_write(lambda: self._run_dir.write_results(results))
        if not keep_state:
            try:
                self._run_dir.checkpoints.keep_weights()
            except CheckpointError as error:
                logger.warning("%s; they still have the state for resuming", error)
        self._copy_to_remote()

    def write_report(self, make: Callable[[], Path]) -> None:
        """Calls ``make``, which writes report.html, and copies it. An error is a warning: the results are safe."""
        try:
            make()
        except Exception as error:  # of the page, which must not cost the caller the results of a long training
            logger.warning("the report cannot be written: %s; `ray-dmml report` tries it again", error)
            logger.debug("the report cannot be written", exc_info=True)
            return
        self._copy_to_remote()

    def close(self) -> None:
        self._lock.close()

    def _copy_to_remote(self) -> None:
        if self._remote is None:
            return
        logger.debug("copying the run to checkpoint.storage_path")
        try:
            self._remote.push(self._run_dir.path)
        except CheckpointError as error:
            logger.warning("%s; training goes on, and the next checkpoint is copied again", error)


def retry_write(write: Callable[[], object]) -> None:
    """Tries again for a while what a full disk forbids. Raises CheckpointError if there was no room in time."""
    deadline, last_message = time.monotonic() + RETRY_S, ""
    while True:
        try:
            write()
            return
        except CheckpointError as error:
            if time.monotonic() > deadline:
                raise
            if str(error) != last_message:
                last_message = str(error)
                logger.warning("%s; trying again for %.0f s", error, RETRY_S)
            time.sleep(RETRY_S / 20)
