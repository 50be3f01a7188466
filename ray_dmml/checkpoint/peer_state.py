"""A peer's state as files and back: what :mod:`~ray_dmml.checkpoint.store` stores and what actors send."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch

from ray_dmml.checkpoint.store import PeerFiles
from ray_dmml.errors import UserError


def encode_peer(state: Mapping[str, Any]) -> PeerFiles:
    """The state of a :class:`~ray_dmml.peer.peer.Peer` as files."""
    training = dict(state)
    files = {"weights.safetensors": _to_safetensors(training.pop("net"))}
    if "ema" in training:
        files["ema.safetensors"] = _to_safetensors(training.pop("ema"))
    buffer = io.BytesIO()
    torch.save(training, buffer)
    files["training.pt"] = buffer.getvalue()
    return files


def decode_peer(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The inverse of :func:`encode_peer`, on the CPU. Nothing in the files can run code.

    Raises:
        UserError: training.pt holds other things than tensors and plain values, or a file is missing
            or is not of its format.
    """
    missing = {"training.pt", "weights.safetensors"} - files.keys()
    if missing:
        raise UserError(f"a peer's state has no {' and no '.join(sorted(missing))}")
    state = _from_torch("training.pt", files["training.pt"])
    state["net"] = _from_safetensors("weights.safetensors", files["weights.safetensors"])
    if "ema.safetensors" in files:
        ema = files["ema.safetensors"]
        state["ema"] = _from_safetensors("ema.safetensors", ema)
    return state


def _from_torch(name: str, content: bytes) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} holds more than tensors and is refused: {reason}") from None
    except Exception as error:  # whatever torch's reader stumbles over in a stranger's bytes
        raise UserError(f"{name} cannot be read: {error!r:.200}") from None
    if not isinstance(state, dict):
        raise UserError(f"{name} holds a {type(state).__name__} and not a peer's state")
    return state


def _from_safetensors(name: str, content: bytes) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(content)
    except Exception as error:
        raise UserError(f"{name} cannot be read: {error!r:.200}") from None


def _to_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    # The format knows one memory layout; loading copies into whichever the net has.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata={"format": "pt"})
