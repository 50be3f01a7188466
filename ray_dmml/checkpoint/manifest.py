"""The manifest of a checkpoint, and JSON files that contain their own checksum.

The manifest lists size and SHA-256 of every file. Its own checksum covers the rest of it, so a damaged
manifest is noticed as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_dmml.errors import UserError

FORMAT = 2
"""Version of the format of checkpoints. A reader refuses the formats before and after its own."""

_EARLIEST_FIELDS = {"format", "step", "files", "meta"}
"""All fields of the earliest manifests, which had no checksum."""

_PEER_FILE = re.compile(r"(?!\.\.?/)[^/\\\0]+/(?!\.\.?$)[^/\\\0]+")
_MAX_BYTES = 64 * 2**20


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
    """Reads what :func:`dump_with_checksum` encoded.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or its checksum does not match.
        RecursionError: its JSON is nested too deeply.
    """
    return _verified(*_read_json(path))


def dump_manifest(step: int, peers: Mapping[str, Mapping[str, bytes]], meta: Mapping[str, Any], *, best: bool) -> bytes:
    """Encodes the manifest of a checkpoint.

    Args:
        step: number of finished steps.
        peers: files by peer and file name.
        meta: JSON data that is stored beside the peers.
        best: the checkpoint is the best one so far.
    """
    files = {
        f"{peer}/{name}": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for peer, contents in peers.items()
        for name, content in contents.items()
    }
    fields = {"format": FORMAT, "version": _own_version(), "step": step, "best": best}
    return dump_with_checksum({**fields, "files": files, "meta": dict(meta)})


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads and validates the manifest in the folder of a checkpoint.

    Returns:
        ``format, version, step, best, files, meta``. ``files`` maps ``PEER/FILE`` to its ``size`` and
        ``sha256``. No file name leads out of the folder.

    Raises:
        OSError: the manifest cannot be read.
        DamagedError: it is damaged.
        UserError: an older or a newer version wrote it.
    """
    file = checkpoint / "manifest.json"
    try:
        raw, manifest = _read_json(file)
        is_earliest = manifest.keys() == _EARLIEST_FIELDS
        if not is_earliest:
            manifest = _verified(raw, manifest)
        if type(manifest["format"]) is not int:
            raise ValueError(f"format is {manifest['format']!r:.100}")
        if is_earliest or manifest["format"] < FORMAT:
            raise UserError(
                f"checkpoint {checkpoint} was written by an older version of ray-dmml, whose checkpoints "
                "this version cannot read; train it again"
            )
        if manifest["format"] > FORMAT:
            raise UserError(
                f"checkpoint {checkpoint} was written by ray-dmml {manifest.get('version', '(unknown)')} "
                f"in format {manifest['format']}; this version ({_own_version()}) reads format {FORMAT}: "
                "update ray-dmml"
            )
        _validate(manifest)
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error!r}") from None
    return manifest


def _read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a JSON file and its object. A pipe would block, and a huge file fill the memory."""
    if not stat.S_ISREG(os.lstat(path).st_mode) or os.lstat(path).st_size > _MAX_BYTES:
        raise ValueError("it is not a plain file of a reasonable size")
    raw = path.read_bytes()
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return raw, content


def _verified(raw: bytes, content: dict[str, Any]) -> dict[str, Any]:
    """The content without its checksum, which must match."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    if dump_with_checksum(content) != raw:
        raise ValueError("its checksum does not match")
    return content


def _validate(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError unless all fields are there and their values are possible."""
    for field, kind in {"step": int, "files": dict, "meta": dict}.items():
        if type(manifest[field]) is not kind:
            raise ValueError(f"{field} is {manifest[field]!r:.100}")
    if not 0 <= manifest["step"] < 10**12:
        raise ValueError(f"step is {manifest['step']}")
    for name, entry in manifest["files"].items():
        if not _PEER_FILE.fullmatch(name):
            raise ValueError(f"{name!r:.100} is not the name of a peer's file")
        if not isinstance(entry, dict) or not entry.keys() >= {"size", "sha256"}:
            raise ValueError(f"{name!r:.100} has no size or no checksum")


def _own_version() -> str:
    try:
        return metadata.version("ray-dmml")
    except metadata.PackageNotFoundError:
        return "unknown"
