"""What a person sees of a look at a data set; it fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from rich.console import Console
from rich.table import Table

from ray_dmml.data.audit import Group, Report
from ray_dmml.data.dataset import printable

SHOWN = 3
"""Findings of a kind that are shown; the JSON file has all."""

_BAR = 40


def print_report(report: Report, console: Console) -> None:
    """Sizes, findings, and a histogram of the classes' sizes."""
    table = Table(box=None, pad_edge=False)
    for heading in ("split", "images", "classes"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, (images, classes) in report.splits.items():
        table.add_row(split, str(images), str(classes))
    console.print(table)
    _section(console, "unreadable images", len(report.unreadable), _lines(report.unreadable))
    _section(console, "exact duplicates", len(report.exact), map(_told, report.exact), "groups")
    _section(console, "near duplicates", len(report.near), map(_told, report.near), "groups")
    two, both = report.in_two_classes, report.in_train_and_test
    _section(console, "one image under two labels", len(two), map(_told, two), "groups")
    _section(console, "one image in train and test", len(both), map(_told, both), "groups")
    small = [f"{printable(label)}: {images}" for label, images in report.small_classes]
    title = f"training classes of fewer than {report.images_per_class} images"
    _section(console, title, len(small), small)
    _say(console, "\nclasses by number of images")
    for line in histogram(report.class_sizes):
        _say(console, f"  {line}")
    _say(console, "\nnothing to mend" if report.is_clean() else "\nthere are findings to mend")


def histogram(sizes: Iterable[int]) -> list[str]:
    """A line for each power of two: 1, 2-3, 4-7, and so on."""
    counts: dict[int, int] = {}
    for size in sizes:
        power = size.bit_length() - 1
        counts[power] = counts.get(power, 0) + 1
    lines = []
    for power in range(min(counts), max(counts) + 1):
        low, high = 2**power, 2 ** (power + 1) - 1
        count = counts.get(power, 0)
        bar = "#" * -(-_BAR * count // max(counts.values()))
        lines.append(f"{low if low == high else f'{low}-{high}':>13}  {count:>7}  {bar}".rstrip())
    return lines


def _section(
    console: Console, title: str, count: int, lines: Iterable[str], unit: str = ""
) -> None:
    _say(console, f"\n{title}: {f'{count} {unit}'.strip() if count else 'none'}")
    for line in islice(lines, SHOWN):
        _say(console, f"  {line}")
    if count > SHOWN:
        _say(console, f"  ... and {count - SHOWN} more")


def _lines(unreadable: Iterable[tuple[str, str]]) -> Iterable[str]:
    return (message for _, message in unreadable)


def _told(group: Group) -> str:
    told = [
        f"{printable(member.name)} ({printable(member.label)}, {member.split})"
        for member in group.members[:SHOWN]
    ]
    more = len(group.members) - SHOWN
    return "\n    = ".join(told) + (f"\n    and {more} more" if more > 0 else "")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
