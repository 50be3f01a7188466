"""The code that a figure was measured with."""

from __future__ import annotations

import subprocess
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


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).parent.parent
    return subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True)
