"""What a person sees of a run: a live bar and a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ray_dmml.config.schema import Config
from ray_dmml.loggers.logger import Logger, learned_terms
from ray_dmml.loggers.notebook import CellDisplay
from ray_dmml.loggers.output import duration
from ray_dmml.loggers.sentences import as_lines, show_sentences
from ray_dmml.loggers.tables import fitting


@contextmanager
def show_run(console: Console, config: Config) -> Iterator[Logger]:
    """Shows a run on a console, and inside the block also what the package says through Python's :mod:`logging`.

    Args:
        console: a terminal gets a live display, anything else gets lines.
        config: the experiment.
    """
    display = LiveLogger(console, config) if console.is_terminal else LinesLogger(console, config)
    package = logging.getLogger("ray_dmml")
    propagate, package.propagate = package.propagate, False
    try:
        with show_sentences(display.print, display.show_activity):
            yield display
    finally:
        package.propagate = propagate
        display.close()


class LinesLogger(Logger):
    """One line an event, for logs and pipes."""

    def __init__(self, console: Console, config: Config) -> None:
        self._console, self._num_steps = console, config.train.steps
        self._parts = "images" if config.data.split_by == "image" else "classes"  # of which a split has its own
        self._terms = ("loss", "metric", *config.loss.terms)
        self._latest: dict[str, Mapping[str, float]] = {}
        self._show_activity = as_lines(self.print)

    def print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a full disk under a log, or a closed stream, ends no training
            # A terminal breaks lines between words; a file gets each sentence as one line.
            self._console.print(text, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)

    def show_activity(self, text: str) -> None:
        """Shows what takes the time right now: as a line, the first time."""
        self._show_activity(text)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if "peers" in metrics:
            self._latest |= learned_terms(metrics["peers"])
        if "images_per_second" in metrics:
            peers = (
                f"{name} " + " ".join(f"{term} {terms[term]:.4f}" for term in self._terms if term in terms)
                for name, terms in self._latest.items()
            )
            rate = f"{metrics['images_per_second']:.1f} images/s"
            if left := (self._num_steps - step) * metrics.get("step_s", 0.0):
                rate += f"  {duration(left)} left"
            self.print("  ".join([f"step {step}/{self._num_steps}", *peers, rate]))
        self._print_evaluation(metrics, step)
        if "checkpoint" in metrics:
            best = ", the best so far" if metrics["checkpoint"] == "best" else ""
            self.print(f"step {step}  checkpoint saved{best}")

    def _print_evaluation(self, metrics: Mapping[str, Any], step: int) -> None:
        """Prints the Recall@1 of an evaluation, and of which classes it is."""
        for key in ("untrained", "validation"):
            if key in metrics:
                split, before = metrics[key].get("split", key), ", untrained" if key == "untrained" else ""
                recall = "  ".join(f"{name} {value:.3f}" for name, value in _recall(metrics[key]).items())
                self.print(f"step {step}  Recall@1 on {split} {self._parts}{before}: {recall}")
                if backbones := metrics[key].get("backbones"):
                    recall = "  ".join(f"{name} {row['recall@1']:.3f}" for name, row in backbones.items())
                    self.print(f"step {step}  Recall@1 on {split} {self._parts}, frozen backbone: {recall}")


class LiveLogger(LinesLogger):
    """A row of loss terms for each peer with its latest validation, and a bar for the run. Each evaluation is also a
    line, which stays.

    Args:
        console: for lines.
        config: the experiment.
        live: shows the table and the bar; None: rich does, on the terminal, below the lines.
    """

    def __init__(self, console: Console, config: Config, live: CellDisplay | None = None) -> None:
        super().__init__(console, config)
        self._names = [str(peer.name) for peer in config.cohort.peers]
        self._recall: dict[str, float] = {}
        self._evaluated = "Recall@1 (validation)" if config.data.validation_fraction else ""
        self._is_animated = live is None
        spinner = [SpinnerColumn("line" if console.options.ascii_only else "dots")] if self._is_animated else []
        columns = [*spinner, TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True)]
        self._bar = Progress(*columns, console=console, expand=True)
        self._task = self._bar.add_task("", total=None, rate="")
        self._has_started = False  # before that there is no table
        self._live = live or Live(console=console, refresh_per_second=8)
        self._live.update(self._render())
        self._live.start()

    def show_activity(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        self._live.update(self._render())

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if "peers" in metrics:
            self._latest |= learned_terms(metrics["peers"])
        if "images_per_second" in metrics:
            self._bar.update(self._task, rate=f"{metrics['images_per_second']:.0f} images/s")
        # The column is of the validation split only; figures of another beside them would be taken for progress.
        self._print_evaluation(metrics, step)
        if "validation" in metrics:
            self._recall, self._evaluated = _recall(metrics["validation"]), f"Recall@1 (validation, step {step})"
        if not metrics:
            self._show_progress(step)
        self._live.update(self._render())

    def rewind(self, step: int) -> None:
        self._show_progress(step)

    def _show_progress(self, step: int) -> None:
        self._has_started = True
        self._bar.update(self._task, total=self._num_steps, completed=step)

    def close(self) -> None:
        if not self._is_animated:  # what stays in a saved notebook looks like the end
            self.show_activity("")
        self._live.transient = not self._has_started  # there is nothing worth keeping on the screen
        self._live.stop()

    def _render(self) -> Group:
        if not self._has_started:
            return Group(self._bar)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("peer", no_wrap=True)
        for heading in self._terms:
            table.add_column(heading, justify="right")
        if self._evaluated:
            table.add_column(self._evaluated, justify="right")
        for name in self._names:
            terms = self._latest.get(name, {})
            table.add_row(name, *(f"{terms[t]:.4f}" if t in terms else "-" for t in self._terms), *self._percent(name))
        if len(self._names) > 1 and self._evaluated:
            table.add_row("ensemble", *([""] * len(self._terms)), *self._percent("ensemble"))
        return Group(fitting(table, self._console), self._bar)

    def _percent(self, name: str) -> list[str]:
        """The cell of the column Recall@1, if there is one."""
        if not self._evaluated:
            return []
        return [f"{100 * self._recall[name]:.1f} %" if name in self._recall else "-"]


def _recall(figures: Mapping[str, Any]) -> dict[str, float]:
    """Recall@1 of each peer and of the ensemble."""
    rows = {**figures["peers"], "ensemble": figures["ensemble"]}
    return {name: row["recall@1"] for name, row in rows.items()}
