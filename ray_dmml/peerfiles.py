"""A peer's state as files and back: what :mod:`~ray_dmml.checkpoint` stores and what actors send."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch

from ray_dmml.checkpoint import PeerFiles
from ray_dmml.errors import UserError


def encode_peer(state: Mapping[str, Any]) -> PeerFiles:
    """The state of a :class:`~ray_dmml.peer.Peer` as files."""
    training = dict(state)
    files = {"weights.safetensors": _to_safetensors(training.pop("net"))}
    if "averaged" in training:
        files["averaged.safetensors"] = _to_safetensors(training.pop("averaged"))
    buffer = io.BytesIO()
    torch.save(training, buffer)
    files["training.pt"] = buffer.getvalue()
    return files


def decode_peer(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The inverse of :func:`encode_peer`, on the CPU. Nothing in the files can run code.

    Raises:
        UserError: training.pt holds other things than tensors and plain values.
    """
    stored = io.BytesIO(files["training.pt"])
    try:
        state: dict[str, Any] = torch.load(stored, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"training.pt holds more than tensors and is refused: {reason}") from None
    state["net"] = safetensors.torch.load(files["weights.safetensors"])
    if "averaged.safetensors" in files:
        state["averaged"] = safetensors.torch.load(files["averaged.safetensors"])
    return state


def _to_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    # The format knows one memory layout; loading copies into whichever the net has.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata={"format": "pt"})
