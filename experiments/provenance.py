"""The code and the processor that a figure was measured with."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from pathlib import Path

NO_CODE = ("*.jsonl", "*.md", "*.png")
"""Files that experiments write; a change of them is no change of code."""


def commit() -> str:
    """The commit of this repository, with `+` where code or settings differ from it."""
    try:
        described = _git("describe", "--always", "--abbrev=12")
    except FileNotFoundError:  # no git
        return "unknown"
    if described.returncode:
        return "unknown"
    changed = _git("diff", "--quiet", "HEAD", "--", ".", *(f":(exclude){name}" for name in NO_CODE))
    return described.stdout.strip() + ("+" if changed.returncode else "")


def cpu() -> str:
    """The processor's model, or `CPU` where the system does not name it.

    Figures of two models differ in the last bit, and after training in more.
    """
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or "CPU"


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).parent.parent
    return subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True)
