"""Embeddings of a frozen peer that are computed once before training, instead of at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ray_dmml.peer.peer import Peer


def keeps_embeddings(peer: Peer) -> bool:
    """Whether the peer publishes embeddings that it has kept (``teacher_view: evaluation``)."""
    return peer.config.teacher_view == "evaluation"


def keep_embeddings(peer: Peer, chunks: Iterable[Tensor], after_chunk: Callable[[], None] = lambda: None) -> None:
    """Embeds all training images if the peer has ``teacher_view: evaluation``.

    The peer publishes these embeddings from now on. A second call does nothing.

    Args:
        chunks: the evaluation view of the training images, uint8 (n, 3, H, H) each, in the order to which the indices
            of a batch refer. Their size may change the last bits.
        after_chunk: called after every chunk.
    """
    if not keeps_embeddings(peer) or peer.kept is not None:
        return
    embeddings = []
    for chunk in chunks:
        embeddings.append(peer.embed_to_publish(chunk))
        after_chunk()
    peer.kept = torch.cat(embeddings)
