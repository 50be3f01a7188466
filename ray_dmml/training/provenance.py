"""The machine and the code that a run was made with."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import ray_dmml


def cpu() -> str:
    """The processor's model, or ``CPU`` where the system does not name it.

    Figures of two models differ in the last bit, and after training in more.
    """
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def commit(folder: Path = Path(ray_dmml.__file__).parents[1]) -> str | None:
    """The commit of a git checkout, by default the one that the package is in; None: it was installed otherwise.

    No process is started for it.
    """
    git = folder / ".git"
    with suppress(OSError):
        if git.is_file():  # of a worktree
            git = folder / git.read_text().partition("gitdir:")[2].strip()
        head = (git / "HEAD").read_text().strip()
        return _commit_of(git, head.removeprefix("ref: ")) if head.startswith("ref: ") else head
    return None


def _commit_of(git: Path, ref: str) -> str | None:
    """The commit of a branch, which is in a file of its own or in a list."""
    common = git
    with suppress(OSError):
        common = git / (git / "commondir").read_text().strip()
    for folder in (git, common):
        with suppress(OSError):
            return (folder / ref).read_text().strip()
    with suppress(OSError):
        for line in (common / "packed-refs").read_text().splitlines():
            if line.endswith(f" {ref}"):
                return line.split()[0]
    return None
