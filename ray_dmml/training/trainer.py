"""The loop over any cohort: steps, evaluation, checkpoints, what is written and what is told.

load images -> build peers -> [run steps -> log -> evaluate -> checkpoint]* -> judge on test classes
                                ^-- back to the last checkpoint, where a peer is lost
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ray_dmml.checkpoint.store import Checkpoint, DamagedError, PeerFiles
from ray_dmml.cohort.cohort import Cohort, StepRow
from ray_dmml.config.schema import Config, dotted, moved
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import build_sampler
from ray_dmml.errors import CheckpointError, Interrupted, PeerLostError, StartLostError, UserError
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.metrics import retrieval_metrics
from ray_dmml.loggers.tensorboard import Events
from ray_dmml.training.run_dir import RunDir

if TYPE_CHECKING:
    from ray_dmml.checkpoint.remote import RunStorage

CHUNK_S = 1.0
"""Seconds of training in one call of the peers: so long a run that is asked to stop may take to."""

LAST_SAVE_S = 60.0
"""Seconds in which the checkpoint of the last step is tried again where it cannot be written."""

STRAGGLES = 0.1
"""Share of the time that a peer waits for another, from which on that is said."""

Figures = dict[str, Any]
"""``{"peers": {name: {"recall@1": ...}}, "ensemble": {"recall@1": ...}}``, fractions."""

MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.evaluate_every",
    "checkpoint.*",
    "failure.*",
    "train.tensorboard",
    "evaluation.*",
    # Where things are and how bytes travel: neither changes a number.
    "data.root",
    "data.source",
    "data.manifest",
    "data.cache_gib",
    "data.cache_dir",
    "cohort.transport",
    "cohort.placement_strategy",
    "cohort.placement_timeout_s",
    "cohort.start_timeout_s",
    "cohort.peers.*.resources*",
    "cohort.peers.*.labels*",
)


class Reporter(Protocol):
    """Who is told how a run goes; the console is one."""

    def note(self, message: str) -> None:
        """One sentence worth knowing."""
        ...

    def doing(self, what: str) -> None:
        """What takes the time from now on, in a few words."""
        ...

    def started(self, config: Config, splits: Splits, facts: Mapping[str, Any]) -> None:
        """The peers are built and training begins."""
        ...

    def step(self, finished: int) -> None:
        """So many steps are finished by every peer."""
        ...

    def losses(self, step: int, row: StepRow, images_per_s: float) -> None:
        """The latest terms of each peer's loss, and the batch images a second."""
        ...

    def evaluated(self, step: int, split: str, figures: Figures) -> None: ...

    def saved(self, step: int, *, best: bool) -> None: ...

    def stopped(self) -> None:
        """The loop is over, finished or not."""
        ...


class Silent:
    """A reporter that tells nobody."""

    def note(self, message: str) -> None: ...
    def doing(self, what: str) -> None: ...
    def started(self, config: Config, splits: Splits, facts: Mapping[str, Any]) -> None: ...
    def step(self, finished: int) -> None: ...
    def losses(self, step: int, row: StepRow, images_per_s: float) -> None: ...
    def evaluated(self, step: int, split: str, figures: Figures) -> None: ...
    def saved(self, step: int, *, best: bool) -> None: ...
    def stopped(self) -> None: ...


def train(
    config: Config | None = None,
    out: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    local: bool = False,
    reporter: Reporter | None = None,
    changed: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains a cohort and judges it on the test classes.

    Args:
        config: the experiment; None with ``resume``: the run's own.
        out: the new run's folder. Not with ``resume``.
        resume: a run to continue from its last checkpoint, or to extend by more ``train.steps``.
        local: all peers in this process, without Ray; the same numbers, slower.
        reporter: is told how it goes; None: nobody.
        changed: with ``resume``: any setting may differ from the checkpoint's, as in a search that
            changes them in mid-run.
        should_stop: is asked about once a second; once it says so, the run ends after the step it
            is at, with a checkpoint of it.

    Returns:
        what ``results.json`` holds: ``untrained`` and ``peers`` (name to figures) and ``ensemble``,
        figures such as ``recall@1`` as fractions, and which weights of which step they are of.

    Raises:
        UserError: a setting, a file or the cluster does not allow it; peers were lost more often
            than ``failure.max_failures`` allows; a loss is not finite.
        Interrupted: ``should_stop`` said so.
    """
    reporter = reporter or Silent()
    try:
        if resume is None:
            return _start(config, out, local, reporter, should_stop)
        if out is not None:
            raise UserError("--resume continues a run in its folder: it takes no --out")
        run = RunDir.open(resume)
        with run.lock():
            return _resume(run, config, local, reporter, changed, should_stop)
    finally:
        reporter.stopped()


def _start(
    config: Config | None,
    out: Path | str | None,
    local: bool,
    reporter: Reporter,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """A new run. Nothing is on disk until all that can be known beforehand is known to be right."""
    if config is None or out is None:
        raise UserError("a new run needs a config and a folder (out)")
    run = RunDir(Path(out))
    run.ensure_empty()
    storage = _storage(config, run, reporter, new=True)
    splits = read_images(config, reporter)
    with ExitStack() as held:

        def run_it(cohort: Cohort, attempt: int) -> dict[str, Any]:
            if attempt == 0:
                run.make()
                held.enter_context(run.lock())
                run.ensure_empty()  # another run may have taken it while the peers started
                run.write_config(config)
            state = _State()
            return _Loop(config, run, splits, cohort, reporter, state, should_stop, storage).run()

        return _once_started(
            config, reporter, lambda: _fresh_cohort(config, splits, local, reporter), run_it
        )


def _once_started(
    config: Config,
    reporter: Reporter,
    build: Callable[[], Cohort],
    run_it: Callable[[Cohort, int], dict[str, Any]],
) -> dict[str, Any]:
    """Where a peer is lost before there is a checkpoint to go back to, all are built anew."""
    attempt = 0
    while True:
        with closing(build()) as cohort:
            try:
                return run_it(cohort, attempt)
            except StartLostError as loss:
                attempt += 1
                if attempt > config.failure.max_failures:
                    raise
                count = f"restart {attempt} of {config.failure.max_failures}"
                reporter.note(f"{loss}; all start anew, {count}")


def _resume(
    run: RunDir,
    config: Config | None,
    local: bool,
    reporter: Reporter,
    changed: bool,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Goes on from the last checkpoint; what was written after it is dropped."""
    config = config or run.config()
    storage = _storage(config, run, reporter)
    checkpoint: Checkpoint | None = None
    if run.checkpoints.index():
        checkpoint = run.checkpoints.load("last", reporter.note)
        if not changed:
            _refuse_changes(config, checkpoint, run)
    threads_before = run.environment().get("threads")
    splits = read_images(config, reporter)

    def build() -> Cohort:
        if checkpoint is None:  # it was killed before its first step
            return _fresh_cohort(config, splits, local, reporter)
        return _build_cohort(config, splits, local, reporter, checkpoint.peers)

    def run_it(cohort: Cohort, _: int) -> dict[str, Any]:
        state = _State()
        if checkpoint is not None:
            state = _State.of(checkpoint)
            for name, since in state.dropped.items():
                reporter.note(f"{name}, dropped at step {since}, takes part again")
            state.dropped = {}
        if threads_before not in (None, list(cohort.threads)):
            reporter.note(
                f"the peers have {list(cohort.threads)} torch threads and had {threads_before}: the "
                "last bits may differ from an undisturbed run (cohort.threads_per_peer sets them)"
            )
        if config.to_yaml() != run.config_file.read_text(encoding="utf-8"):
            run.write_config(config)
        loop = _Loop(config, run, splits, cohort, reporter, state, should_stop, storage)
        return loop.run(cut=True)

    return _once_started(config, reporter, build, run_it)


def evaluate(
    run: Path | str, weights: str | None = None, *, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Judges a run's checkpoint on the test classes again, in this process.

    Args:
        run: its folder.
        weights: ``last``, ``best`` (on validation classes) or ``ema`` (of the last); None: those
            of the run's own result.

    Returns:
        as :func:`train`.

    Raises:
        UserError: no such run or checkpoint, or its images are gone.
    """
    from ray_dmml.cohort.local import LocalCohort

    note = (reporter or Silent()).note
    folder = RunDir.open(run)
    config = folder.config()
    environment = folder.environment()
    threads = max(environment.get("threads") or [0]) or None
    cohort_config = config.cohort.model_copy(update={"threads_per_peer": threads})
    splits = load_splits(
        config.data,
        skip=frozenset(environment.get("skipped_images", ())),
        check=False,
    )
    which = config.weights_to_judge(weights)
    checkpoint = folder.checkpoints.load("best" if which == "best" else "last", note)
    # As the run's own result: of those that were left at its end.
    last = checkpoint if which != "best" else folder.checkpoints.load("last", note)
    peers = [p for p in config.cohort.peers if p.name not in last.meta.get("dropped", {})]
    cohort_config = cohort_config.model_copy(update={"peers": tuple(peers)})
    config = config.model_copy(update={"cohort": cohort_config})
    with closing(LocalCohort(config, splits, initial_weights=False)) as cohort:
        cohort.load(checkpoint.peers)
        untrained = checkpoint.meta["untrained"]
        return _judge(config, splits, cohort, "test", which, checkpoint.step, untrained)


@dataclass
class _State:
    """What the loop carries over an interruption."""

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    untrained: Figures = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    """Peers that the others go on without, and since which step."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _State:
        meta = checkpoint.meta
        best, best_step, untrained = meta["best"], meta["best_step"], meta["untrained"]
        return cls(checkpoint.step, best, best_step, untrained, dict(meta.get("dropped", {})))


class _Loop:
    def __init__(
        self,
        config: Config,
        run: RunDir,
        splits: Splits,
        cohort: Cohort,
        reporter: Reporter,
        state: _State,
        should_stop: Callable[[], bool],
        storage: RunStorage | None,
    ) -> None:
        run.checkpoints.num_to_keep = config.checkpoint.num_to_keep
        self._config, self._run, self._splits = config, run, splits
        self._cohort, self._reporter, self._state = cohort, reporter, state
        self._should_stop, self._storage = should_stop, storage
        self._restarts = 0
        self._reached = state.step  # the last step that every peer is known to have finished
        self._cut_to: int | None = None  # a step after which metrics.jsonl is still to be cut
        self._left_behind: dict[str, PeerFiles] = {}  # states of dropped peers
        self._step_s = CHUNK_S  # the latest measured: before the first, a step is a chunk
        self._unwritten: list[dict[str, Any]] = []
        self._bad: dict[str, set[int]] = {}  # peer to the steps whose batches it left out
        self._batch_size = config.data.classes_per_batch * config.data.images_per_class
        self._seconds, self._steps = 0.0, 0

    def run(self, *, cut: bool = False) -> dict[str, Any]:
        """Args: cut: metrics.jsonl may have rows of after the state's step."""
        config = self._config
        if cut:
            self._cut_to = self._state.step
            self._write([])
        facts = {
            "threads": list(self._cohort.threads),
            "devices": list(self._cohort.devices),
            "nodes": list(self._cohort.nodes),
            "transport": self._cohort.transport,
            "skipped_images": list(self._splits.skipped),
            "steps_per_epoch": build_sampler(config, self._splits).steps_per_epoch,
        }
        try:
            self._run.write_environment(**facts)
        except CheckpointError as error:
            self._reporter.note(f"{error}; training goes on")
        self._reporter.started(config, self._splits, facts)
        while True:
            try:
                self._train()
                return self._finish()
            except PeerLostError as loss:
                self._roll_back(loss)

    def _train(self) -> None:
        """From where the peers are to the last step."""
        config, state = self._config, self._state
        events = (
            Events(self._run.tensorboard, state.step + 1, self._reporter.note)
            if config.train.tensorboard
            else None
        )
        try:
            if state.step == 0:
                if not self._run.checkpoints.index():
                    self._save(best=False)  # so that a run killed at any time can be resumed
                if (
                    config.evaluation.untrained
                    and config.evaluation.split == "test"
                    and not state.untrained
                ):
                    self._reporter.doing("judging the untrained peers")
                    state.untrained = _figures(config, self._cohort, "test", self._splits.test)
                    self._reporter.evaluated(0, "untrained", state.untrained)
            while state.step < config.train.steps:
                self._advance(events)
        finally:
            if events is not None:
                events.close()

    def _roll_back(self, loss: PeerLostError) -> None:
        """All peers to the last checkpoint, with others in the places of those that are lost, or
        without them. Every number of a run follows from the step, so the same steps give the same
        weights again."""
        failure, reporter = self._config.failure, self._reporter
        untrained = self._state.untrained
        while True:
            self._restarts += 1
            drop = failure.on_peer_loss == "drop" and self._restarts > failure.max_failures
            # Each peer can be dropped once: what is lost besides would be lost for ever.
            allowed = failure.max_failures + (len(self._config.cohort.peers) if drop else 0)
            if failure.on_peer_loss == "fail" or self._restarts > allowed:
                raise self._given_up(loss)
            if not self._run.checkpoints.index():
                raise StartLostError(str(loss))
            checkpoint = self._run.checkpoints.load("last", reporter.note)
            count = "" if drop else f", restart {self._restarts} of {failure.max_failures}"
            reporter.note(
                f"{loss}; all go back from step {self._reached} to {checkpoint.step}{count}"
            )
            reporter.doing("starting lost peers anew")
            began = time.monotonic()
            try:
                self._cohort.recover(drop=drop)
                self._cohort.load(checkpoint.peers)
                break
            except PeerLostError as again:
                loss = again
        before = self._state.dropped
        state = self._state = _State.of(checkpoint)
        state.untrained = state.untrained or untrained
        # Whoever is no longer there, since this loss or since one that this checkpoint is older than.
        state.dropped = {
            name: min(before.get(name, state.step), state.step)
            for name in checkpoint.peers
            if name not in self._cohort.names
        }
        self._left_behind = {name: checkpoint.peers[name] for name in state.dropped}
        if new := [name for name in state.dropped if name not in before]:
            reporter.note(f"without {', '.join(new)} from step {state.step} on")
        self._unwritten = [row for row in self._unwritten if row["step"] <= state.step]
        self._reached, self._cut_to = state.step, state.step
        self._write([])
        reporter.note(f"recovered in {time.monotonic() - began:.1f} s")
        reporter.step(state.step)

    def _given_up(self, loss: PeerLostError) -> UserError:
        failure = self._config.failure
        why = (
            "failure.on_peer_loss is fail"
            if failure.on_peer_loss == "fail"
            else f"failure.max_failures, {failure.max_failures}, are used up"
        )
        if not self._run.checkpoints.index():
            return PeerLostError(f"{loss}; {why}")
        step = self._run.checkpoints.load("last").step
        return PeerLostError(f"{loss}; {why}. The checkpoint of step {step} is whole")

    def _advance(self, events: Events | None) -> None:
        """The steps up to the next event, and that event."""
        state, train = self._state, self._config.train
        start, stop = state.step, self._next_stop()
        self._reporter.doing("training")
        began = time.perf_counter()
        rows: list[StepRow] = []
        while start + len(rows) < stop and not self._should_stop():
            # In calls of about a second, so that a run that is asked to stop does.
            first = start + len(rows)
            last = min(stop, first + max(1, int(CHUNK_S / self._step_s)))
            chunk_began = time.perf_counter()
            rows += self._cohort.run(first, last, self._reach)
            self._step_s = max(1e-4, (time.perf_counter() - chunk_began) / (last - first))
        seconds = time.perf_counter() - began
        self._seconds += seconds
        self._steps += len(rows)
        asked_to_stop = start + len(rows) < stop
        state.step = stop = start + len(rows)
        if rows:
            self._tell(start, rows, seconds, events)
        if asked_to_stop:
            at = f"stopped at step {stop} of {train.steps}"
            if stop and not self._save(best=False):
                kept = self._run.checkpoints.load("last").step
                raise Interrupted(f"{at}; the last checkpoint is of step {kept}")
            raise Interrupted(at)
        ends = stop == train.steps
        before = (state.best, state.best_step)
        is_best = (ends or _due(stop, train.evaluate_every)) and self._validate(events)
        is_due = ends or is_best or _due(stop, self._config.checkpoint.every_steps)
        if is_due and not self._save(best=is_best):
            state.best, state.best_step = before  # what is not kept can be beaten

    def _reach(self, step: int) -> None:
        self._reached = max(self._reached, step)
        self._reporter.step(step)

    def _tell(self, start: int, rows: list[StepRow], seconds: float, events: Events | None) -> None:
        """What the steps after ``start`` were like."""
        stop = start + len(rows)
        self._write([{"step": start + i + 1, "peers": row} for i, row in enumerate(rows)])
        for step, row in enumerate(rows, start + 1):
            for name, terms in row.items():
                if "left_out" in terms:
                    steps = self._bad.setdefault(name, set())
                    steps.add(step)
                    self._reporter.note(
                        f"{name} has left out {len(steps)} batches whose numbers were not finite"
                    )
        rate = self._batch_size * len(rows) / seconds
        latest = _latest(rows)
        self._reporter.losses(stop, latest, rate)
        if events is not None:
            values = {f"{t}/{peer}": v for peer, terms in latest.items() for t, v in terms.items()}
            events.add(stop, {**values, "images_per_s": rate})

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """To metrics.jsonl, with what could not be written before."""
        is_first = not self._unwritten and (bool(rows) or self._cut_to is not None)
        self._unwritten += rows
        try:
            self._write_the_rest()
        except CheckpointError as error:
            if is_first:  # said once
                self._reporter.note(f"{error}; it is kept until it can be")

    def _write_the_rest(self) -> None:
        """Raises CheckpointError where it still cannot be written."""
        if self._cut_to is not None:
            self._run.truncate_metrics(self._cut_to)
            self._cut_to = None
        if self._unwritten:
            self._run.append_metrics(self._unwritten)
            self._unwritten = []

    def _next_stop(self) -> int:
        train, step = self._config.train, self._state.step
        every = (train.log_every, train.evaluate_every, self._config.checkpoint.every_steps)
        return min(train.steps, *(step - step % n + n for n in every if n))

    def _validate(self, events: Events | None) -> bool:
        """Judges on the held-out training classes; whether this is the best so far."""
        if self._splits.validation is None:
            return False
        state = self._state
        self._reporter.doing("judging on validation classes")
        figures = _figures(
            self._config,
            self._cohort,
            "validation",
            self._splits.validation,
            ema=self._config.weights_to_judge() == "ema",
        )
        self._write([{"step": state.step, "validation": figures}])
        self._reporter.evaluated(state.step, "validation", figures)
        if events is not None:
            judged = {**figures["peers"], "ensemble": figures["ensemble"]}
            values = {
                f"validation_{metric.replace('@', '_at_')}/{name}": value
                for name, found in judged.items()
                for metric, value in found.items()
            }
            events.add(state.step, values)
        value = (
            figures["ensemble"]["recall@1"]
            if self._config.train.monitor == "ensemble"
            else float(np.mean([found["recall@1"] for found in figures["peers"].values()]))
        )
        if value <= state.best:
            if state.best == 1:
                self._reporter.note(
                    f"validation Recall@1 is 100 % since step {state.best_step} and can choose no "
                    "later checkpoint; hold out more classes, or judge --weights last"
                )
            return False
        state.best, state.best_step = value, state.step
        return True

    def _save(self, *, best: bool) -> bool:
        """Whether it could be written."""
        state = self._state
        self._reporter.doing("saving a checkpoint")
        meta = {
            "config": self._config.model_dump(mode="json"),
            "best": state.best,
            "best_step": state.best_step,
            "untrained": state.untrained,
            "dropped": state.dropped,
        }
        peers = {**self._cohort.state(), **self._left_behind}

        def write() -> None:
            self._write_the_rest()  # no checkpoint is ahead of the metrics
            self._run.sync_metrics()
            self._run.checkpoints.save(state.step, peers, meta, best=best)

        # Steps are worth more than their checkpoint: the next one may find room again. After the last
        # step there is no next one, and before the first nothing is worth anything yet.
        if state.step == 0:
            write()
        elif state.step == self._config.train.steps:
            self._retry_write(write)
        else:
            try:
                write()
            except CheckpointError as error:
                self._reporter.note(f"{error}; training goes on")
                return False
        self._copy()
        self._reporter.saved(state.step, best=best)
        return True

    def _retry_write(self, write: Callable[[], object]) -> None:
        """Tries what a full disk forbids until there is room, or nobody has made any."""
        until, told = time.monotonic() + LAST_SAVE_S, ""
        while True:
            try:
                write()
                return
            except CheckpointError as error:
                if time.monotonic() > until:
                    raise
                if str(error) != told:
                    told = str(error)
                    self._reporter.note(f"{error}; trying again for {LAST_SAVE_S:.0f} s")
                time.sleep(LAST_SAVE_S / 20)

    def _copy(self) -> None:
        if self._storage is None:
            return
        self._reporter.doing("copying the run to its storage")
        try:
            self._storage.push(self._run)
        except CheckpointError as error:
            told = "training goes on, and the next checkpoint is copied again"
            self._reporter.note(f"{error}; {told}")

    def _finish(self) -> dict[str, Any]:
        self._retry_write(self._write_the_rest)
        which = self._config.weights_to_judge()
        step = self._state.step
        if which == "best":
            try:
                checkpoint = self._run.checkpoints.load("best")
                step = checkpoint.step
                if step != self._state.step:
                    self._cohort.load_weights(checkpoint.peers)
            except DamagedError as damage:
                self._reporter.note(f"{damage}; the last weights are judged instead of the best")
                which = "last"
        split = self._config.evaluation.split
        self._reporter.doing(f"judging on the {split} classes")
        results = _judge(
            self._config, self._splits, self._cohort, split, which, step, self._state.untrained
        )
        if self._seconds:
            results["images_per_s"] = round(self._batch_size * self._steps / self._seconds, 2)
        if self._state.dropped:
            results["dropped"] = self._state.dropped
        self._tell_who_waited()
        self._retry_write(lambda: self._run.write_results(results))
        self._copy()
        return results

    def _tell_who_waited(self) -> None:
        """Where one peer is the slowest by far, the others' cores or GPUs are idle for it."""
        waited = {name: self._cohort.waited[name] for name in self._cohort.names}
        slowest = min(waited, key=lambda name: waited[name])
        longest = max(waited.values())
        if longest - waited[slowest] > STRAGGLES * self._seconds:
            told = ", ".join(f"{n} {s:.0f} s" for n, s in waited.items() if n != slowest)
            self._reporter.note(
                f"the others waited for {slowest}: {told} of {self._seconds:.0f} s of training"
            )


def _storage(
    config: Config, run: RunDir, reporter: Reporter, *, new: bool = False
) -> RunStorage | None:
    """Where the run is copied to; one that goes on while that place does not answer is told so."""
    if config.checkpoint.storage_path is None:
        return None
    from ray_dmml.checkpoint.remote import RunStorage  # pyarrow is loaded by those who ask for it

    try:
        storage = RunStorage(config.checkpoint.storage_path)
        if new:
            storage.ensure_empty()
    except CheckpointError as error:
        if new:
            raise
        reporter.note(f"{error}; this run is not copied there")
        return None
    return None if storage.is_at(run.path) else storage


def read_images(config: Config, reporter: Reporter) -> Splits:
    """The images of a run; what is wrong with them is known before a process starts.

    Raises:
        UserError: as :func:`load_splits`, or batches of data.classes_per_batch cannot be made of them.
    """
    reporter.doing("reading the images")
    splits = load_splits(config.data)
    sampler = build_sampler(config, splits)
    if sampler.small_classes:
        reporter.note(
            f"{sampler.small_classes} training classes have fewer than "
            f"{config.data.images_per_class} images: they give all they have, others fill the batch"
        )
    for peer in config.cohort.peers:
        if peer.weights == "none" and peer.batch_norm == "frozen" and not config.train.init_from:
            reporter.note(
                f"{peer.name} starts from random weights with its BatchNorm statistics frozen; from "
                "scratch batch_norm: train learns better"
            )
    return splits


def _build_cohort(
    config: Config,
    splits: Splits,
    local: bool,
    reporter: Reporter,
    state: Mapping[str, PeerFiles] | None = None,
    weights: Mapping[str, PeerFiles] | None = None,
) -> Cohort:
    """Peers in a state of theirs, or with weights from elsewhere, or with their own initial ones."""
    attempts = 0
    while True:
        reporter.doing("starting the peers")
        cohort = None
        try:
            cohort = _new_cohort(config, splits, local, state is None and weights is None)
            if state is not None:
                cohort.load(state)
            elif weights is not None:
                cohort.load_weights(weights)
            return cohort
        except BaseException as error:
            if cohort is not None:
                cohort.close()
            attempts += 1
            if not isinstance(error, PeerLostError) or config.failure.on_peer_loss == "fail":
                raise
            if attempts > config.failure.max_failures:
                raise
            reporter.note(
                f"{error}; all start anew, restart {attempts} of {config.failure.max_failures}"
            )


def _new_cohort(config: Config, splits: Splits, local: bool, initial_weights: bool) -> Cohort:
    # Each takes seconds to import, and a run needs one of them.
    if local:
        from ray_dmml.cohort.local import LocalCohort

        return LocalCohort(config, splits, initial_weights=initial_weights)
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    return RayCohort(config, splits, initial_weights=initial_weights)


def _judge(
    config: Config,
    splits: Splits,
    cohort: Cohort,
    split: str,
    which: str,
    step: int,
    untrained: Figures,
) -> dict[str, Any]:
    """The figures of test or validation classes, in the form of results.json."""
    images: ImageSet = getattr(splits, split)
    figures = _figures(config, cohort, split, images, ema=which == "ema")
    return {
        "untrained": untrained.get("peers", {}),
        "untrained_ensemble": untrained.get("ensemble", {}),
        **figures,
        "weights": which,
        "step": step,
        "split": split,
        "classes": images.num_classes,
        "images": len(images),
        "queries": None if images.query is None else len(images.query),
        "gallery": None if images.gallery is None else len(images.gallery),
        "init_from": str(config.train.init_from) if config.train.init_from else None,
    }


def _figures(
    config: Config, cohort: Cohort, split: str, images: ImageSet, *, ema: bool = False
) -> Figures:
    found = cohort.embeddings(split, ema=ema)

    def judged(embeddings: np.ndarray) -> dict[str, float]:
        return retrieval_metrics(
            embeddings,
            images.labels,
            recall_at=sorted({1, *config.evaluation.recall_at}),
            query=images.query,
            gallery=images.gallery,
        )

    return {
        "peers": {name: judged(embeddings) for name, embeddings in found.items()},
        "ensemble": judged(ensemble_embedding(list(found.values()))),
    }


def _latest(rows: list[StepRow]) -> StepRow:
    """Each peer's last step that it learned from (a peer in skip mode does not at every one)."""
    return {
        peer: next((row[peer] for row in reversed(rows) if "loss" in row[peer]), {})
        for peer in rows[-1]
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _fresh_cohort(config: Config, splits: Splits, local: bool, reporter: Reporter) -> Cohort:
    """Peers before their first step, from ``train.init_from`` where that is set."""
    return _build_cohort(config, splits, local, reporter, weights=_initial_weights(config))


def _initial_weights(config: Config) -> dict[str, Any] | None:
    """The best (else last) weights of the run that this one starts from, by peer name."""
    source = config.train.init_from
    if source is None:
        return None
    store = RunDir.open(source).checkpoints
    peers = store.load("best" if "best" in store.index() else "last").peers
    missing = [str(peer.name) for peer in config.cohort.peers if peer.name not in peers]
    if missing:
        raise UserError(
            f"train.init_from {source}: it has no peer {', '.join(missing)}; it has {', '.join(peers)}"
        )
    return {str(peer.name): peers[str(peer.name)] for peer in config.cohort.peers}


def _refuse_changes(config: Config, checkpoint: Checkpoint, run: RunDir) -> None:
    # Read as a config: settings that an older version did not know have their defaults.
    before = dotted(Config.parse(moved(checkpoint.meta["config"])).model_dump(mode="json"))
    now = dotted(config.model_dump(mode="json"))
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(fnmatchcase(key, may) for may in MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        raise UserError(
            f"--resume {run.path}: its config was changed: {'; '.join(changed)}. Only the number of steps, "
            "what is written and evaluated, and where the images are may change; start a new run with "
            f"--init-from {run.path} instead"
        )
    if config.train.steps < checkpoint.step:
        raise UserError(
            f"--resume {run.path}: it has finished {checkpoint.step} steps already, "
            f"train.steps is {config.train.steps}"
        )
