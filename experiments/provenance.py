"""Which code a figure is of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Of this repository, with `+` where files differ from it."""
    described = subprocess.run(
        [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--abbrev=12",
            "--dirty=+",
        ],
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"
