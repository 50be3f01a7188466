"""Files that are replaced in one move: whenever a process dies, a file has its old content or its new one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ray_dmml.errors import CheckpointError


def replace_file(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Replaces a file in one move. Raises CheckpointError if that is not possible; the old one is then unchanged.

    Args:
        path: the file.
        content: its new content.
        sync: wait until it is on the disk. If the machine dies, the file has the old content or the new one.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        if sync:
            wait_for_disk(aside)
        os.replace(aside, path)
        if sync:
            wait_for_disk(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise CheckpointError(f"{path} cannot be written: {error}") from None


def wait_for_disk(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
