"""Embeddings of a frozen peer that are computed once before training, instead of at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.loader import in_chunks
from ray_dmml.peer.peer import Peer


def keep_embeddings(
    peer: Peer, images: ImageSet, data: DataConfig, after_chunk: Callable[[], None] = lambda: None
) -> None:
    """Embeds the evaluation view of all training images if the peer has ``teacher_view: evaluation``.

    The peer publishes these embeddings from now on. A second call does nothing.

    Args:
        images: the training images, to whose order the indices of a batch refer.
        data: sets the number of images that are embedded at a time, which may change the last bits.
        after_chunk: called after every chunk of images.
    """
    if peer.config.teacher_view != "evaluation" or peer.kept is not None:
        return
    chunks = []
    for chunk in in_chunks(images, data.classes_per_batch * data.images_per_class):
        chunks.append(peer.embed_to_publish(chunk))
        after_chunk()
    peer.kept = torch.cat(chunks)
