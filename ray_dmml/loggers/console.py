"""What a person sees of a run: one live bar on a terminal, plain lines where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
