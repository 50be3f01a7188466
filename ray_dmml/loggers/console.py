"""What a person sees of a run: one live bar on a terminal, plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

from ray_dmml.cohort.cohort import StepRow
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import Splits
from ray_dmml.training.trainer import Figures
from ray_dmml.tune.search_space import Search, final_head, final_rows, is_unbeaten

if TYPE_CHECKING:  # which loads Ray Tune
    from ray_dmml.tune.tuner import Trial

_KIND = {"test": "unseen", "validation": "validation"}
_TERMS = ("loss", "metric", "distance", "angle")


class PlainReporter:
    """A line an event, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._total = 0

    def note(self, message: str) -> None:
        self.console.print(f"note: {message}", highlight=False, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        pass

    def started(self, config: Config, splits: Splits, facts: Mapping[str, Any]) -> None:
        self._total = config.train.steps
        for line in describe(config, splits, facts):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, finished: int) -> None:
        pass

    def losses(self, step: int, row: StepRow, images_per_s: float) -> None:
        told = "  ".join(
            f"{peer} " + " ".join(f"{term} {terms[term]:.4f}" for term in _TERMS if term in terms)
            for peer, terms in row.items()
            if terms
        )
        self.console.print(
            f"step {step}/{self._total}  {told}  {images_per_s:.1f} images/s",
            highlight=False,
            soft_wrap=True,
        )

    def evaluated(self, step: int, split: str, figures: Figures) -> None:
        told = "  ".join(
            f"{name} {found['recall@1']:.3f}"
            for name, found in [*figures["peers"].items(), ("ensemble", figures["ensemble"])]
        )
        what = "test classes, untrained" if split == "untrained" else f"{split} classes"
        self.console.print(
            f"step {step}  Recall@1 on {what}: {told}", highlight=False, soft_wrap=True
        )

    def saved(self, step: int, *, best: bool) -> None:
        self.console.print(
            f"step {step}  checkpoint saved{', the best so far' if best else ''}", highlight=False
        )

    def stopped(self) -> None:
        pass


class LiveReporter:
    """A terminal: a bar for the run, a row of loss terms for each peer, the last evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rate = ""
        self._losses: StepRow = {}
        self._recall: dict[str, float] = {}
        self._judged = ""
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
        self._names: list[str] = []
        self._live = Live(self._render(), console=console, refresh_per_second=8)
        self._live.start()

    def note(self, message: str) -> None:
        self.console.print(f"note: {message}", highlight=False, markup=False)

    def doing(self, what: str) -> None:
        self._bar.update(self._task, description=what)
        self._refresh()

    def started(self, config: Config, splits: Splits, facts: Mapping[str, Any]) -> None:
        for line in describe(config, splits, facts):
            self.console.print(line, highlight=False, markup=False)
        self._names = [str(peer.name) for peer in config.cohort.peers]
        self._bar.update(self._task, total=config.train.steps)

    def step(self, finished: int) -> None:
        self._bar.update(self._task, completed=finished)
        self._refresh()

    def losses(self, step: int, row: StepRow, images_per_s: float) -> None:
        self._losses = row
        self._bar.update(self._task, rate=f"{images_per_s:.0f} images/s")
        self._refresh()

    def evaluated(self, step: int, split: str, figures: Figures) -> None:
        self._recall = {name: found["recall@1"] for name, found in figures["peers"].items()}
        self._recall["ensemble"] = figures["ensemble"]["recall@1"]
        self._judged = "untrained" if split == "untrained" else f"{split}, step {step}"
        self._refresh()

    def saved(self, step: int, *, best: bool) -> None:
        pass

    def stopped(self) -> None:
        self._live.transient = not self._names  # nothing was shown yet that is worth keeping
        self._live.stop()

    def _refresh(self) -> None:
        self._live.update(self._render())

    def _render(self) -> Group:
        if not self._names:
            return Group(self._bar)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("peer", no_wrap=True)
        for term in _TERMS:
            table.add_column(term, justify="right")
        table.add_column(
            f"Recall@1 ({self._judged})" if self._judged else "Recall@1", justify="right"
        )
        for name in self._names:
            terms = self._losses.get(name, {})
            told = [f"{terms[term]:.4f}" if term in terms else "-" for term in _TERMS]
            table.add_row(name, *told, self._percent(name))
        if len(self._names) > 1:
            table.add_row("ensemble", *([""] * len(_TERMS)), self._percent("ensemble"))
        return Group(table, self._bar)

    def _percent(self, name: str) -> str:
        return f"{100 * self._recall[name]:.1f} %" if name in self._recall else "-"


def describe(config: Config, splits: Splits, facts: Mapping[str, Any]) -> list[str]:
    """What is about to run, in a few lines."""

    def told(name: str) -> str:
        images = getattr(splits, name)
        return f"{len(images):,} images of {images.num_classes} classes"

    lines = [f"data      {config.data.name}: train {told('train')}"]
    if splits.validation is not None:
        lines.append(f"          validation {told('validation')}, held out of training")
    lines.append(f"          test {told('test')}")
    batch = config.data.classes_per_batch * config.data.images_per_class
    lines.append(
        f"          batches of {batch}: {config.data.classes_per_batch} classes x "
        f"{config.data.images_per_class} images, an epoch is {facts['steps_per_epoch']} steps"
    )
    for peer in config.cohort.peers:
        listed = () if isinstance(peer.view, str) else [each.name for each in peer.view]
        view = peer.view if isinstance(peer.view, str) else "+".join(listed) or "as decoded"
        every = "step" if peer.update_interval == 1 else f"{peer.update_interval} steps"
        role = "frozen" if peer.frozen else f"update every {every}"
        if peer.update_mode == "skip" and peer.update_interval > 1:
            role += " (skip)"
        lines.append(
            f"{peer.name:<9} {peer.backbone}, {peer.embedding_size}-d, seed {peer.seed}, "
            f"view {view}, {role}"
        )
    devices = ", ".join(dict.fromkeys(facts["devices"]))
    threads = ", ".join(map(str, dict.fromkeys(facts["threads"])))
    lines.append(
        f"cohort    {len(config.cohort.peers)} peers on {devices}, torch threads each: {threads}, "
        f"exchange: {facts['transport']}"
    )
    return lines


class TrialsTable:
    """The trials of a search: a live table on a terminal, else a line for each report."""

    def __init__(self, console: Console, search: Search) -> None:
        self.console, self.search = console, search
        self._live: Live | None = None
        self._told: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> TrialsTable:
        if self.console.is_terminal:
            self._live = Live(self._render([]), console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, trials: Sequence[Trial]) -> None:
        if self._live is not None:
            self._live.update(self._render(trials))
            return
        for trial in trials:
            if self._told.get(trial.name) == (trial.status, trial.step):
                continue
            if trial.name not in self._told:
                drawn = ", ".join(f"{key} {_drawn(value)}" for key, value in trial.params.items())
                self._print(f"trial {trial.number}: {drawn}")
            self._told[trial.name] = (trial.status, trial.step)
            if trial.status == "failed":
                self._print(f"trial {trial.number}: failed: {trial.error}")
            elif trial.reports:
                value = f"{self.search.config.metric} {trial.objective or 0:.4f}"
                self._print(f"trial {trial.number}: {trial.status}, step {trial.step}, {value}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self, trials: Sequence[Trial]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("trial", justify="right")
        table.add_column("", no_wrap=True)
        for name in ("step", self.search.config.metric, "time"):
            table.add_column(name, justify="right", no_wrap=True)
        for key in self.search.config.space:
            table.add_column(".".join(key.split(".")[-2:]), overflow="fold")
        done = [t.objective for t in trials if t.finished and t.objective is not None]
        for trial in trials:
            value = "-" if trial.objective is None else f"{100 * trial.objective:.1f} %"
            table.add_row(
                str(trial.number),
                "" if trial.status == "training" else trial.status,
                str(trial.step),
                value,
                f"{trial.seconds:.0f} s",
                *(_drawn(trial.params[key]) for key in self.search.config.space),
                style="bold" if done and trial.finished and trial.objective == max(done) else "",
            )
        return table


def _drawn(value: Any) -> str:
    told = f"{value:.3g}" if isinstance(value, float) else str(value)
    return told if len(told) <= 24 else told[:23] + "…"


def final_table(final: Mapping[str, Any], search: Search, console: Console) -> None:
    """The test figures of a search's final runs."""
    seeds = len(final["best"]["test"])
    of = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    table = Table(
        title=f"test classes, {of}, trained on all training classes, %",
        title_justify="left",
        title_style="",
        header_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        caption="no trial beat the config as it is" if is_unbeaten(final) else None,
        caption_justify="left",
        caption_style="",
    )
    for place, name in enumerate(final_head(search)):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for row in final_rows(final, search):
        table.add_row(*row)
    console.print(table)


def results_table(results: Mapping[str, Any], console: Console) -> None:
    """The figures of a run: each peer and the ensemble, untrained beside trained."""
    metrics = list(results["ensemble"])
    table = Table(
        title=f"{_searched(results)} of {results['classes']} {_KIND[results['split']]} classes, "
        f"weights: {results['weights']} (step {results['step']}), %",
        title_justify="left",
        title_style="",
        header_style="bold",
    )
    table.add_column("")
    for metric in metrics:
        table.add_column(_heading(metric), justify="right")
    before = "at the start" if results["init_from"] else "untrained"
    rows = [(f"{name}, {before}", figures) for name, figures in results["untrained"].items()]
    if results["untrained_ensemble"]:
        rows.append((f"ensemble, {before}", results["untrained_ensemble"]))
    rows += list(results["peers"].items())
    for name, figures in rows:
        table.add_row(name, *(_percent(figures, metric) for metric in metrics))
    table.add_section()
    table.add_row(
        "ensemble",
        *(_percent(results["ensemble"], metric) for metric in metrics),
        style="bold",
    )
    console.print(table)


def _searched(results: Mapping[str, Any]) -> str:
    if results["queries"] is None:
        return f"{results['images']:,} images"
    return f"{results['queries']:,} queries in {results['gallery']:,} images"


def _percent(figures: Mapping[str, float], metric: str) -> str:
    """A dash where a figure was not taken, as after `recall_at` was changed on resume."""
    return f"{100 * figures[metric]:.1f}" if metric in figures else "-"


def _heading(metric: str) -> str:
    if metric.startswith("recall@"):
        return "R" + metric.removeprefix("recall")
    return {"map@r": "MAP@R", "r_precision": "R-prec"}.get(metric, metric)


def elapsed(since: float) -> str:
    """Minutes and seconds since a ``time.monotonic()``."""
    minutes, seconds = divmod(round(time.monotonic() - since), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
