"""Converts the state of a peer to files and back: those of a checkpoint, or the same bytes in memory."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.checkpoint.store import STATE_FILE
from ray_dmml.errors import UserError


def write_peer(state: Mapping[str, Any], folder: Path) -> PeerFiles:
    """Writes the ``state_dict()`` of a :class:`~ray_dmml.peer.peer.Peer` into an empty folder, and waits until it is on
    the disk. No file is held in memory. Raises OSError."""
    names = []
    for name, content in _parts(state):
        names.append(name)
        if name.endswith(".safetensors"):
            _write_tensors(content, folder / name)
        else:
            _write_rest(content, folder / name)
    return PeerFiles.written(folder, names)


def encode_peer(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of the files that :func:`write_peer` writes."""
    files = {}
    for name, content in _parts(state):
        if name.endswith(".safetensors"):
            files[name] = safetensors.torch.save(_contiguous(content), metadata=_METADATA)
        else:
            torch.save(content, buffer := io.BytesIO())
            files[name] = buffer.getvalue()
    return files


def decode_peer(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Decodes the files of a peer, with tensors on the CPU. No file can run code.

    Without training.pt the state is ``net`` and, if there is one, ``ema``. Of :class:`PeerFiles`, one file at a time is
    in memory.

    Raises:
        DamagedError: a file differs from what was written.
        UserError: a file is missing or not of its format, or contains more than tensors and plain values.
    """
    if "weights.safetensors" not in files:
        raise UserError("a peer's state has no weights.safetensors")
    state = _read(files, STATE_FILE) if STATE_FILE in files else {}
    state["net"] = _read(files, "weights.safetensors")
    if "ema.safetensors" in files:
        state["ema"] = _read(files, "ema.safetensors")
    return state


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    content = files[name]
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"{name} holds more than tensors and is refused: {str(error).splitlines()[0]}") from None
    except Exception as error:  # untrusted bytes make the readers raise nearly anything
        raise UserError(f"{name} cannot be read: {error!r:.200}") from None
    if not isinstance(state, dict):
        raise UserError(f"{name} holds a {type(state).__name__} instead of a peer's state")
    return state


_METADATA = {"format": "pt"}


def _parts(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names of a peer's files, and what is in them."""
    rest = dict(state)
    yield "weights.safetensors", rest.pop("net")
    if "ema" in rest:
        yield "ema.safetensors", rest.pop("ema")
    yield STATE_FILE, rest


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # The format has one memory layout. Loading copies into that of the net.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(_contiguous(tensors), path, metadata=_METADATA)
    except SafetensorError as error:  # the number in its text is all that is left of an OSError
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from None
    # Its file is readable for its owner only. The folder was made with the usual permissions.
    os.chmod(path, os.stat(path.parent).st_mode & 0o666)


def _write_rest(rest: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(rest, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides why a file could not be written
            raise error.__context__ from None
        raise
