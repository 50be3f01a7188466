"""Converts the state of a peer to files and back, for checkpoints and for messages between actors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch

from ray_dmml.checkpoint.store import STATE_FILE, PeerFiles
from ray_dmml.errors import UserError


def encode_peer(state: Mapping[str, Any]) -> PeerFiles:
    """Encodes the ``state_dict()`` of a :class:`~ray_dmml.peer.peer.Peer` as files."""
    rest = dict(state)
    files = {"weights.safetensors": _to_safetensors(rest.pop("net"))}
    if "ema" in rest:
        files["ema.safetensors"] = _to_safetensors(rest.pop("ema"))
    torch.save(rest, buffer := io.BytesIO())
    return {**files, STATE_FILE: buffer.getvalue()}


def decode_peer(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Decodes what :func:`encode_peer` encoded, with tensors on the CPU. No file can run code.

    Without training.pt the state is ``net`` and, if there is one, ``ema``.

    Raises:
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
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(files[name])
        state: object = torch.load(io.BytesIO(files[name]), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"{name} holds more than tensors and is refused: {str(error).splitlines()[0]}") from None
    except Exception as error:  # untrusted bytes make the readers raise nearly anything
        raise UserError(f"{name} cannot be read: {error!r:.200}") from None
    if not isinstance(state, dict):
        raise UserError(f"{name} holds a {type(state).__name__} instead of a peer's state")
    return state


def _to_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    # The format has one memory layout. Loading copies into that of the net.
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata={"format": "pt"})
