"""What a person sees of a run: a live bar and a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ray_dmml.config.schema import Config
from ray_dmml.loggers.logger import LatestTerms, Logger

PACKAGE = "ray_dmml"
TERMS = ("loss", "metric", "distance", "angle")


class ConsoleLogger(Logger):
    """Shows a run on a console. As a context manager it also shows what the package says through Python's
    :mod:`logging` inside the block.

    Args:
        console: where to print. A terminal gets a live display, anything else gets lines.
        config: the experiment.
    """

    def __init__(self, console: Console, config: Config) -> None:
        self._display: _Display = _Live(console, config) if console.is_terminal else _Lines(console, config)
        self._latest = LatestTerms()
        self._handler = _Handler(self._display)
        self._level_before = logging.NOTSET

    def __enter__(self) -> ConsoleLogger:
        package = logging.getLogger(PACKAGE)
        self._level_before = package.level
        package.setLevel(logging.DEBUG)
        package.addHandler(self._handler)
        package.propagate = False
        return self

    def __exit__(self, *error: object) -> None:
        package = logging.getLogger(PACKAGE)
        package.removeHandler(self._handler)
        package.setLevel(self._level_before)
        package.propagate = True
        self.close()

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if not metrics:
            self._display.progress(step)
        if "peers" in metrics:
            self._latest.update(metrics["peers"])
        if "images_per_second" in metrics:
            self._display.terms(step, self._latest.by_peer, metrics["images_per_second"])
        for split in ("untrained", "validation"):
            if split in metrics:
                self._display.figures(step, split, metrics[split])
        if "checkpoint" in metrics:
            self._display.checkpoint(step, metrics["checkpoint"] == "best")

    def rewind(self, step: int) -> None:
        self._display.progress(step)

    def close(self) -> None:
        self._display.close()


class _Display(Protocol):
    def activity(self, text: str) -> None: ...
    def sentence(self, text: str) -> None: ...
    def progress(self, step: int) -> None: ...
    def terms(self, step: int, by_peer: Mapping[str, Mapping[str, float]], rate: float) -> None: ...
    def figures(self, step: int, split: str, figures: Mapping[str, Any]) -> None: ...
    def checkpoint(self, step: int, is_best: bool) -> None: ...
    def close(self) -> None: ...


class _Handler(logging.Handler):
    """DEBUG names the current activity; the levels above it are sentences."""

    def __init__(self, display: _Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno <= logging.DEBUG:
            self._display.activity(text)
        elif record.levelno < logging.WARNING:
            self._display.sentence(text)
        else:
            self._display.sentence(f"{record.levelname.lower()}: {text}")


class _Lines:
    """One line an event, for logs and pipes."""

    def __init__(self, console: Console, config: Config) -> None:
        self._console, self._num_steps = console, config.train.steps

    def activity(self, text: str) -> None:
        pass

    def sentence(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def progress(self, step: int) -> None:
        pass

    def terms(self, step: int, by_peer: Mapping[str, Mapping[str, float]], rate: float) -> None:
        line = "  ".join(
            f"{peer} " + " ".join(f"{term} {terms[term]:.4f}" for term in TERMS if term in terms)
            for peer, terms in by_peer.items()
        )
        self.sentence(f"step {step}/{self._num_steps}  {line}  {rate:.1f} images/s")

    def figures(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
        rows = {**figures["peers"], "ensemble": figures["ensemble"]}
        line = "  ".join(f"{name} {row['recall@1']:.3f}" for name, row in rows.items())
        classes = "test classes, untrained" if split == "untrained" else f"{split} classes"
        self.sentence(f"step {step}  Recall@1 on {classes}: {line}")

    def checkpoint(self, step: int, is_best: bool) -> None:
        self.sentence(f"step {step}  checkpoint saved{', the best so far' if is_best else ''}")

    def close(self) -> None:
        pass


class _Live:
    """A terminal: a row of loss terms for each peer, the last evaluation, and a bar for the run."""

    def __init__(self, console: Console, config: Config) -> None:
        self._console = console
        self._names = [str(peer.name) for peer in config.cohort.peers]
        self._num_steps = config.train.steps
        self._terms: dict[str, dict[str, float]] = {}
        self._recall: dict[str, float] = {}
        self._evaluated = ""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, rate="")
        self._has_started = False  # before that there is no table
        self._live = Live(self._render(), console=console, refresh_per_second=8)
        self._live.start()

    def activity(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        self._refresh()

    def sentence(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def progress(self, step: int) -> None:
        self._has_started = True
        self._bar.update(self._task, total=self._num_steps, completed=step)
        self._refresh()

    def terms(self, step: int, by_peer: Mapping[str, Mapping[str, float]], rate: float) -> None:
        self._terms = {name: dict(terms) for name, terms in by_peer.items()}
        self._bar.update(self._task, rate=f"{rate:.0f} images/s")
        self._refresh()

    def figures(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
        rows = {**figures["peers"], "ensemble": figures["ensemble"]}
        self._recall = {name: row["recall@1"] for name, row in rows.items()}
        self._evaluated = "untrained" if split == "untrained" else f"{split}, step {step}"
        self._refresh()

    def checkpoint(self, step: int, is_best: bool) -> None:
        pass

    def close(self) -> None:
        self._live.transient = not self._has_started  # there is nothing worth keeping on the screen
        self._live.stop()

    def _refresh(self) -> None:
        self._live.update(self._render())

    def _render(self) -> Group:
        if not self._has_started:
            return Group(self._bar)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("peer", no_wrap=True)
        for term in TERMS:
            table.add_column(term, justify="right")
        evaluated = f"Recall@1 ({self._evaluated})" if self._evaluated else "Recall@1"
        table.add_column(evaluated, justify="right")
        for name in self._names:
            terms = self._terms.get(name, {})
            cells = [f"{terms[term]:.4f}" if term in terms else "-" for term in TERMS]
            table.add_row(name, *cells, self._percent(name))
        if len(self._names) > 1:
            table.add_row("ensemble", *([""] * len(TERMS)), self._percent("ensemble"))
        return Group(table, self._bar)

    def _percent(self, name: str) -> str:
        return f"{100 * self._recall[name]:.1f} %" if name in self._recall else "-"
