"""The training loop over any cohort.

start the peers -> [train steps -> log -> evaluate -> checkpoint]* -> final evaluation
                    ^-- after a lost peer: back to the last checkpoint
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ray_dmml.checkpoint.manifest import DamagedError
from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.checkpoint.store import Checkpoint
from ray_dmml.cohort.cohort import Cohort, CohortFactory, StepRow
from ray_dmml.cohort.phases import WAITING
from ray_dmml.config.code import code_in_use, digests
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import Splits
from ray_dmml.data.loader import build_sampler
from ray_dmml.errors import Interrupted, PeerLostError
from ray_dmml.evaluation.evaluation import Evaluation, Figures, evaluate_during_training
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.backbones import evaluate_backbones
from ray_dmml.training.describe import describe_cohort, describe_early_stop, describe_saturation, describe_waits
from ray_dmml.training.images import warn_of_images
from ray_dmml.training.peer_states import load_peers, write_peers
from ray_dmml.training.pictures import NUM_NEIGHBORS, Pictures
from ray_dmml.training.recovery import Decision, RecoveryPolicy
from ray_dmml.training.results import NOT_EVALUATED, evaluate_all, evaluated_split, results_of
from ray_dmml.training.run_dir import RunDir
from ray_dmml.training.run_writer import RunWriter
from ray_dmml.training.state import TrainingState
from ray_dmml.training.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

CALL_S = 1.0
"""Seconds of training in one call of the peers. A run that is asked to stop does so within this time."""


class Trainer:
    """Trains a cohort in a run's folder.

    Args:
        initial_weights: weights from another run, by peer name; None: the peers' own.
        checkpoint: the checkpoint to go on from; None: a new run.
        should_stop: asked about once a second whether the run is to end after the current step.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        splits: Splits,
        cohort_factory: CohortFactory,
        *,
        initial_weights: Mapping[str, PeerFiles] | None,
        checkpoint: Checkpoint | None,
        writer: RunWriter,
        loggers: Logger,
        should_stop: Callable[[], bool],
    ) -> None:
        run_dir.checkpoints.num_to_keep = config.checkpoint.num_to_keep
        self.config, self.run_dir, self.splits = config, run_dir, splits
        self.split = evaluated_split(config, splits)  # of the final evaluation
        self.state = TrainingState()
        self.policy = RecoveryPolicy(config.failure, len(config.cohort.peers))
        self._cohort_factory, self._initial_weights = cohort_factory, initial_weights
        self._writer, self._loggers, self._should_stop = writer, loggers, should_stop
        self._checkpoint = checkpoint
        self._pictures = Pictures(config, loggers)
        self._cohort: Cohort | None = None
        self._saved_step = 0  # of the last checkpoint
        self._reached = 0  # the last step that every peer is known to have finished
        self._step_s = CALL_S  # seconds of a step; before the first one, a step is a call
        self._is_saturated = False  # the user knows that validation cannot improve any more
        self._nonfinite: dict[str, set[int]] = {}  # name of a peer to the steps that it left out
        self._batch_size = config.data.classes_per_batch * config.data.images_per_class
        self._stopwatch, self._num_steps = Stopwatch(), 0

    # --- the loop ---------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the last step and returns what results.json holds.

        Raises:
            UserError: peers were lost more often than ``failure`` allows.
            Interrupted: ``should_stop`` asked for it; there is a checkpoint.
        """
        failure: PeerLostError | None = None
        try:
            while True:
                try:
                    self.prepare(failure)
                    self.train()
                    return self.finish()
                except PeerLostError as error:
                    failure = error
        finally:
            self.close()
            self._pictures.close()
            self._writer.close()

    def prepare(self, failure: PeerLostError | None) -> None:
        """Starts the peers, or recovers from a failure as the policy decides."""
        if failure is None:
            checkpoint, self._checkpoint = self._checkpoint, None
            self.start(checkpoint)
            if checkpoint is not None:
                logger.info("resumed at step %d of %d", checkpoint.step, self.config.train.steps)
            return
        self._loggers.log({"lost": str(failure)}, self._reached)
        has_checkpoint = bool(self.run_dir.checkpoints.index())
        checkpoint = self.run_dir.checkpoints.load("last", verify=False) if has_checkpoint else None
        starts_again = self._cohort is None or checkpoint is None
        decision = self.policy.decide(failure, checkpoint.step if checkpoint else None, can_drop=not starts_again)
        if starts_again or checkpoint is None:
            logger.warning("%s; all peers start again (%s)", failure, self.policy.describe(decision))
            self.close()
            self.start(checkpoint)
        else:
            self.roll_back(failure, decision, checkpoint)

    def train(self) -> None:
        """Trains from the current step to the last one, or until early stopping ends the run."""
        if self.state.step == 0:
            self.before_first_step()
        while not self.state.is_over(self.config):
            stop = self.next_stop()
            self.train_until(stop)
            if self.state.step < stop:
                self.interrupt()
            previous_best = self.state.best, self.state.best_step
            is_best = self.is_due(self.config.train.evaluate_every) and self.validate()
            is_save_due = is_best or self.is_due(self.config.checkpoint.every_steps)
            if is_save_due and not self.save(best=is_best):
                # A later one can still win. Early stopping counts from here: the run has improved.
                self.state.best, self.state.best_step = previous_best

    def next_stop(self) -> int:
        """The next step at which something is logged, evaluated or saved."""
        train, step = self.config.train, self.state.step
        every = (train.log_every, train.evaluate_every, self.config.checkpoint.every_steps)
        return min(train.steps, *(step - step % n + n for n in every if n))

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last one, is due."""
        return self.state.is_over(self.config) or (every > 0 and self.state.step % every == 0)

    def train_until(self, stop: int) -> None:
        """Trains up to a step, or to an earlier one if the run is asked to stop."""
        logger.debug("training")
        began = time.perf_counter()
        rows: list[StepRow] = []
        start = self.state.step
        while start + len(rows) < stop and not self._should_stop():
            first = start + len(rows)
            last = min(stop, first + max(1, int(CALL_S / self._step_s)))
            call_began = time.perf_counter()
            rows += self.cohort.run(first, last, self._on_step)
            self._step_s = max(1e-4, (time.perf_counter() - call_began) / (last - first))
        self.state.step = start + len(rows)
        if rows:
            self.log_steps(rows, time.perf_counter() - began)

    # --- start and recovery -----------------------------------------------------------------

    @property
    def cohort(self) -> Cohort:
        assert self._cohort is not None, "the peers are not started"
        return self._cohort

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Builds the peers: in the state of a checkpoint, or with initial weights."""
        logger.debug("starting the peers")
        has_weights = checkpoint is not None or self._initial_weights is not None
        with self._stopwatch.measure("start of the peers"):
            self._cohort = self._cohort_factory(self.config, self.splits, initial_weights=not has_weights)
            try:
                if checkpoint is not None:
                    checkpoint = load_peers(self.cohort, self.run_dir.checkpoints, checkpoint)
                elif self._initial_weights is not None:
                    self.cohort.load_weights(self._initial_weights)
            except PeerLostError:
                self.close()  # the start has failed, and the next attempt is a start again
                raise
        self.state = TrainingState.of(checkpoint)
        for name, since in self.state.dropped.items():
            logger.info("%s, dropped at step %d, takes part again", name, since)
        self.state.dropped = {}
        self._reached = self.state.step
        self._writer.open()  # nothing of a new run is on the disk before its peers are built
        self._loggers.rewind(self.state.step)
        self._write_facts()

    def _write_facts(self) -> None:
        facts = {
            "threads": list(self.cohort.threads),
            "devices": list(self.cohort.devices),
            "nodes": list(self.cohort.nodes),
            "transport": self.cohort.transport,
            "skipped_images": list(self.splits.skipped),
            "code": digests(code_in_use()),
            "steps_per_epoch": build_sampler(self.config, self.splits).steps_per_epoch,
        }
        self._writer.write_facts(self.config, self.splits, facts)
        for line in describe_cohort(self.config, self.splits, facts):
            logger.info("%s", line)

    def roll_back(self, failure: PeerLostError, decision: Decision, checkpoint: Checkpoint) -> None:
        """Puts all peers back to a checkpoint, with new peers for the lost ones or without them.

        Every number of a run is a function of the step, so the same steps give the same weights again.
        """
        how = self.policy.describe(decision)
        logger.warning("%s; all peers go back from step %d to %d (%s)", failure, self._reached, checkpoint.step, how)
        logger.debug("recovering lost peers")
        began = time.monotonic()
        with self._stopwatch.measure("recovery"):
            self.cohort.recover(failure, drop=decision is Decision.DROP)
            checkpoint = load_peers(self.cohort, self.run_dir.checkpoints, checkpoint)
        before, untrained = self.state.dropped, self.state.untrained
        state = self.state = TrainingState.of(checkpoint)
        state.untrained = state.untrained or untrained
        # A peer may be gone since this failure, or since one that the checkpoint is older than.
        state.dropped = {
            name: min(before.get(name, state.step), state.step)
            for name in checkpoint.peers
            if name not in self.cohort.names
        }
        if new := [name for name in state.dropped if name not in before]:
            logger.warning("without %s from step %d on", ", ".join(new), state.step)
        self._reached = state.step
        self._loggers.rewind(state.step)
        logger.info("recovered in %.1f s", time.monotonic() - began)

    def interrupt(self) -> None:
        """Ends a run that was asked to stop, with a checkpoint. Raises Interrupted."""
        message = f"stopped at step {self.state.step} of {self.config.train.steps}"
        if self.state.step not in (0, self._saved_step) and not self.save(best=False):
            kept = self.run_dir.checkpoints.load("last", verify=False).step
            raise Interrupted(f"{message}; the last checkpoint is of step {kept}")
        raise Interrupted(message)

    def close(self) -> None:
        """Ends the peers."""
        cohort, self._cohort = self._cohort, None
        if cohort is not None:
            cohort.close()

    # --- what happens on the way ------------------------------------------------------------

    def before_first_step(self) -> None:
        """A checkpoint, so that a run that is killed at any time can be resumed; untrained figures."""
        if not self.run_dir.checkpoints.index():
            self.save(best=False)
        self._pictures.show_views(self.splits.train)
        if self.config.evaluation.untrained and self.split is not None and not self.state.untrained:
            logger.debug("evaluating the untrained peers")
            with self._stopwatch.measure("evaluation before training"):
                backbones = evaluate_backbones(self.cohort, self.config, self.split, getattr(self.splits, self.split))
                embeddings, images = self.cohort.embeddings(self.split), getattr(self.splits, self.split)
                figures, _ = evaluate_during_training(embeddings, images, self.config.evaluation.recall_at)
            self.state.untrained = {**figures, "split": self.split, "backbones": backbones}
            self._loggers.log({"untrained": self.state.untrained}, 0)

    def _on_step(self, step: int) -> None:
        self._reached = max(self._reached, step)
        self._loggers.log({}, step)

    def log_steps(self, rows: list[StepRow], seconds: float) -> None:
        """Hands the rows of the latest steps to the loggers."""
        self._stopwatch.add("training", seconds)
        self._num_steps += len(rows)
        for step, row in enumerate(rows, self.state.step - len(rows) + 1):
            self._loggers.log({"peers": row}, step)
            for name, terms in row.items():
                if "skipped_nonfinite" in terms:
                    steps = self._nonfinite.setdefault(name, set())
                    steps.add(step)
                    logger.warning("%s has left out %d batches whose values were not finite", name, len(steps))
        speed = {
            "images_per_second": self._batch_size * len(rows) / seconds,
            "step_s": seconds / len(rows),
            "waited_s": {name: self.cohort.seconds[name][WAITING] for name in self.cohort.names},
        }
        self._loggers.log(speed, self.state.step)
        self._pictures.hand_over()
        self._loggers.flush()

    def validate(self) -> bool:
        """Evaluates on the held-out training classes; whether this is the best so far."""
        state, images, recall_at = self.state, self.splits.validation, self.config.evaluation.recall_at
        if images is None:
            return False
        logger.debug("evaluating on the validation images")
        with self._stopwatch.measure("validation"):
            embeddings = self.cohort.embeddings("validation", ema=self.config.weights_to_evaluate() == "ema")
            figures, ensemble = evaluate_during_training(embeddings, images, recall_at, keep=NUM_NEIGHBORS)
        self._loggers.log({"validation": figures}, state.step)
        self._pictures.show_worst(ensemble, images, state.step)
        self._loggers.flush()
        value = figures["ensemble"]["recall@1"]
        if self.config.train.monitor == "mean_peer":
            learners = self.config.cohort.learners
            value = float(np.mean([row["recall@1"] for name, row in figures["peers"].items() if name in learners]))
        if state.take(value):
            return True
        if not self._is_saturated and (advice := describe_saturation(state)):
            self._is_saturated = True
            logger.warning("%s", advice)
        return False

    def save(self, *, best: bool) -> bool:
        """Writes a checkpoint; False if that is not possible and training can go on without it."""
        state = self.state
        logger.debug("saving a checkpoint")
        is_last = state.is_over(self.config)
        with self._stopwatch.measure("checkpoints"):
            write = partial(write_peers, self.cohort, self.run_dir.checkpoints, state.dropped)
            if not self._writer.save(state.step, write, state.meta(self.config), best=best, is_last=is_last):
                return False
        self._saved_step = state.step
        self._loggers.log({"checkpoint": "best" if best else "last", "is_last": is_last}, state.step)
        return True

    # --- the end ----------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """The final evaluation, if there are images for one, written to results.json; then pictures and the report."""
        if self.state.step < self.config.train.steps:
            logger.info("%s", describe_early_stop(self.state, self.config))
        self._writer.write_metrics()
        weights, step = self._load_final_weights()
        evaluation, figures = self._evaluate_finally(weights)
        results = self._results(evaluation, figures, weights, step)
        for line in describe_waits(self.cohort, self._stopwatch.seconds.get("training", 0.0)):
            logger.info("%s", line)
        for line in results["warnings"]:
            logger.warning("%s", line)
        self._writer.write_results(results, keep_state=self.config.checkpoint.final == "state")
        self.close()  # the rest takes seconds, for which the peers need not hold their devices
        self._show_end(results, evaluation)
        return results

    def _load_final_weights(self) -> tuple[str, int]:
        """Which weights are evaluated, and of which step."""
        weights, step = self.config.weights_to_evaluate(), self.state.step
        if weights == "best":
            try:
                checkpoint = self.run_dir.checkpoints.load("best")
            except DamagedError as error:
                logger.warning("%s; the last weights are evaluated instead of the best", error)
                return "last", step
            if checkpoint.step != step:
                self.cohort.load_weights(checkpoint.peers)
            step = checkpoint.step
        return weights, step

    def _evaluate_finally(self, weights: str) -> tuple[Evaluation | None, Figures]:
        """None and empty figures if there are no images for it."""
        if self.split is None:
            return None, NOT_EVALUATED
        logger.debug("evaluating on the %s images", self.split)
        with self._stopwatch.measure("final evaluation"):
            embeddings = self.cohort.embeddings(self.split, ema=weights == "ema")
            evaluation = evaluate_all(self.config, embeddings, getattr(self.splits, self.split))
            return evaluation, evaluation.summary()

    def _results(self, evaluation: Evaluation | None, figures: Figures, weights: str, step: int) -> dict[str, Any]:
        """What results.json holds."""
        images = None if evaluation is None else evaluation.images
        results = results_of(self.config, self.split, images, figures, self.state.untrained, weights, step)
        if train_s := self._stopwatch.seconds.get("training", 0.0):
            results["images_per_second"] = round(self._batch_size * self._num_steps / train_s, 2)
        said = [*warn_of_images(self.config, self.splits), describe_saturation(self.state)]
        results["notes"] = [text for text in said if text]
        results["seconds"] = self._stopwatch.results({name: self.cohort.seconds[name] for name in self.cohort.names})
        if self.state.step < self.config.train.steps:
            results["stopped_early"] = self.state.step
        if self.state.dropped:
            results["dropped"] = self.state.dropped
        return results

    def _show_end(self, results: dict[str, Any], evaluation: Evaluation | None) -> None:
        """The last pictures, the results for the loggers, and report.html."""
        self._pictures.hand_over(wait=True)
        if evaluation is not None:
            self._pictures.show_embeddings(evaluation.embeddings, evaluation.images, self.state.step)
        self._loggers.log({"final": results}, self.state.step)
        if self.config.train.report:
            from ray_dmml.training.report import write_run_report  # not every run has a report

            self._writer.write_report(lambda: write_run_report(self.run_dir, self.config, results, evaluation))
