"""Processes of a command."""

from contextlib import suppress
from pathlib import Path


def below(pid: int, title: bytes) -> list[int]:
    """The processes below a process whose command line has the title in it."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(entry.name)] = (entry / "cmdline").read_bytes()
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return [each for each in found if title in names.get(each, b"")]
