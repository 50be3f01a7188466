"""A search on the console: the table of its trials while they train, and the table of the final runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_dmml.loggers.tables import print_table
from ray_dmml.tune.results import (
    baseline_is_best,
    final_columns,
    final_rows,
    short_name,
    short_value,
)
from ray_dmml.tune.search_space import Search
from ray_dmml.tune.trial import Trial


class TrialsTable:
    """The trials of a search: a live table on a terminal, otherwise a line for each report."""

    def __init__(self, console: Console, search: Search) -> None:
        self.console, self.search = console, search
        self._live: Live | None = None
        self._printed: set[str] = set()

    def __enter__(self) -> TrialsTable:
        if self.console.is_terminal:
            self._live = Live(self._table([]), console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the live display, so that another one can begin."""
        if self._live is not None:
            self._live.stop()

    def show(self, trials: Sequence[Trial]) -> None:
        """Shows the trials after a change."""
        if self._live is not None:
            self._live.update(self._table(trials))
            return
        for line in (line for trial in trials for line in self._lines(trial)):
            if line not in self._printed:
                self._printed.add(line)
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _lines(self, trial: Trial) -> Iterator[str]:
        params = ", ".join(f"{key} {short_value(self.search, key, value)}" for key, value in trial.params.items())
        yield f"trial {trial.number}: {params}"
        if trial.status == "failed":
            yield f"trial {trial.number}: failed: {trial.error}"
        elif trial.objective is not None:
            value = f"{self.search.config.metric} {trial.objective:.4f}"
            yield f"trial {trial.number}: {self._state(trial)}, step {trial.step}, {value}"
        elif len(self.search.runs) > 1:
            yield f"trial {trial.number}: {self._state(trial)}"

    def _state(self, trial: Trial) -> str:
        """The status of a trial, or which of its runs is training."""
        num_runs = len(self.search.runs)
        if trial.status != "training" or num_runs == 1:
            return trial.status
        return f"run {min(trial.finished_runs + 1, num_runs)} of {num_runs}"

    def _table(self, trials: Sequence[Trial]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("trial", ""):
            table.add_column(name, no_wrap=True)
        for name in ("step", self.search.config.metric, "time"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("changed parameters")
        best = max((t.objective or 0.0 for t in trials if t.finished), default=None)
        for trial in trials:
            state = self._state(trial)
            table.add_row(
                f"{trial.number} (baseline)" if trial.is_baseline else str(trial.number),
                "" if state == "training" else state,
                str(trial.step),
                "-" if trial.objective is None else f"{100 * trial.objective:.1f} %",
                f"{trial.seconds:.0f} s",
                ", ".join(
                    f"{short_name(key)} {short_value(self.search, key, value)}"
                    for key, value in trial.params.items()
                    if value != self.search.baseline[key]
                ),
                style="bold" if trial.finished and trial.objective == best else "",
            )
        return table


def final_table(final: Mapping[str, Any], search: Search, console: Console) -> None:
    """Prints the test metrics of the final runs."""
    seeds = len(final["best"]["test"])
    what = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    table = Table(
        title=f"test classes, {what}, trained on all training classes, %",
        title_justify="left",
        title_style="",
        header_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        caption="No trial was better than the baseline." if baseline_is_best(final) else None,
        caption_justify="left",
        caption_style="",
    )
    for place, name in enumerate(final_columns(search)):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for row in final_rows(final, search):
        table.add_row(*row)
    print_table(table, console)
