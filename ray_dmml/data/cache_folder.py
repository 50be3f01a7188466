"""The folder of what ray-dmml keeps on a machine for later runs. This module loads no torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def default_folder() -> Path:
    """``ray-dmml`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``.

    Raises:
        OSError: there is no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "ray-dmml"
    try:
        return Path.home() / ".cache" / "ray-dmml"
    except RuntimeError:
        raise OSError(errno.ENOENT, "there is no home folder", "~/.cache") from None
