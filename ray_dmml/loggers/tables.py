"""Tables on a console: no figure is ever cut off."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

WIDEST = 10_000  # characters


def print_table(table: Table, console: Console) -> None:
    """Prints a table with whole cells. On a terminal that is too narrow, it prints some columns at a time, each time
    beside the first one. A file or pipe gets lines as long as needed."""
    for part in _parts(table, console, console.width if console.is_terminal else WIDEST):
        part.width = _width(part, console)
        console.print(part, width=max(part.width, console.width), crop=False)


def fitting(table: Table, console: Console) -> Table:
    """The table for a live display: without the columns before the last one that have no room in the console."""
    columns = list(table.columns)
    while len(columns) > 2 and _measure(_part(table, columns, title=True), console).minimum > console.width:
        del columns[-2]
    return _part(table, columns, title=True, caption=True)


def _parts(table: Table, console: Console, width: int) -> Iterator[Table]:
    first, *rest = (replace(column, no_wrap=True) for column in table.columns)
    columns = [first]
    is_first = True
    for column in rest:
        if len(columns) > 1 and _width(_part(table, [*columns, column]), console) > width:
            yield _part(table, columns, title=is_first)
            columns, is_first = [first], False
        columns.append(column)
    yield _part(table, columns, title=is_first, caption=True)


def _part(table: Table, columns: list[Column], *, title: bool = False, caption: bool = False) -> Table:
    part = copy(table)
    part.columns = [replace(column, _index=number) for number, column in enumerate(columns)]
    part.title = table.title if title else None
    part.caption = table.caption if caption else None
    return part


def _width(table: Table, console: Console) -> int:
    """The characters that the table needs."""
    return _measure(table, console).maximum


def _measure(table: Table, console: Console) -> Measurement:
    return console.measure(table, options=console.options.update(max_width=WIDEST))
