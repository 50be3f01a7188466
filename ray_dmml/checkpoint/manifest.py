"""The manifest of a checkpoint, which lists its files, and JSON files that contain their own checksum."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_dmml.errors import UserError

if TYPE_CHECKING:
    from ray_dmml.checkpoint.peer_files import PeerFiles

FORMAT = 2
"""Version of the format of checkpoints. A reader refuses the formats before and after its own."""

_PEER_FILE = re.compile(r"(?!\.\.?/)[^/\\\0]+/(?!\.\.?$)[^/\\\0]+")


class DamagedError(UserError):
    """A checkpoint differs from what was written. The message names the file and the difference."""


def dump_with_checksum(content: Mapping[str, Any]) -> bytes:
    """Encodes a mapping as JSON with a SHA-256 of itself in the field ``checksum``.

    The encoding must never change: every version has to distinguish a newer file from a damaged one.
    """
    plain = json.dumps(content, indent=1)
    checksum = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1).encode()


def load_with_checksum(path: Path) -> dict[str, Any]:
    """Reads what :func:`dump_with_checksum` encoded. It opens no pipe, which would block, and no huge file.

    Raises:
        OSError: the file cannot be read.
        ValueError, RecursionError: it is not such a file, or its checksum does not match.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > 64 * 2**20:
        raise ValueError("it is not a plain file of a reasonable size")
    raw = path.read_bytes()
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    content.pop("checksum", None)
    if dump_with_checksum(content) != raw:
        raise ValueError("its checksum does not match")
    return content


def dump_manifest(step: int, peers: Mapping[str, PeerFiles], meta: Mapping[str, Any], *, best: bool) -> bytes:
    """Encodes the manifest of a checkpoint; for the arguments see ``CheckpointStore.save``."""
    files = {
        f"{peer}/{name}": entry._asdict() for peer, files in peers.items() for name, entry in files.entries.items()
    }
    fields = {"format": FORMAT, "version": _own_version(), "step": step, "best": best, "files": files, "meta": meta}
    return dump_with_checksum(fields)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads and validates the manifest in the folder of a checkpoint.

    Returns:
        ``format, version, step, best, files, meta``. ``files`` maps ``PEER/FILE`` to its ``size`` and
        ``sha256``. No file name leads out of the folder.

    Raises:
        OSError, DamagedError: the manifest cannot be read, or it is damaged.
        UserError: another version wrote it.
    """
    file = checkpoint / "manifest.json"
    try:
        manifest = load_with_checksum(file)
        written = manifest["format"]
        if type(written) is int and written != FORMAT:
            raise UserError(
                f"checkpoint {checkpoint} was written by ray-dmml {manifest.get('version')} in format {written}; "
                f"this version ({_own_version()}) reads format {FORMAT}: "
                f"{'update ray-dmml' if written > FORMAT else 'train it again'}"
            )
        for field, kind in {"format": int, "step": int, "files": dict, "meta": dict}.items():
            if type(manifest[field]) is not kind:
                raise ValueError(f"{field} is {manifest[field]!r:.100}")
        if not 0 <= manifest["step"] < 10**12:
            raise ValueError(f"step is {manifest['step']}")
        for name, entry in manifest["files"].items():
            if not _PEER_FILE.fullmatch(name):
                raise ValueError(f"{name!r:.100} is not the name of a peer's file")
            if not isinstance(entry, dict) or (type(entry.get("size")), type(entry.get("sha256"))) != (int, str):
                raise ValueError(f"{name!r:.100} has no size or no checksum")
        return manifest
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error!r}") from None


def _own_version() -> str:
    try:
        return metadata.version("ray-dmml")
    except metadata.PackageNotFoundError:
        return "unknown"
