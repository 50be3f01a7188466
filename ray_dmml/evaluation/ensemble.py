"""The ensemble of a cohort: the concatenated embeddings of its peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dmml.errors import UserError


def ensemble_embedding(per_peer: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Concatenates the L2-normalised embeddings of M peers and scales the rows to length 1.

    The inner product of two rows is the mean of the peers' cosine similarities.

    Args:
        per_peer: (N, D_m) float of each peer, in peer order, normalised or not. A row of zeros stays zero.

    Returns:
        (N, D_1 + ... + D_M) float32. Each part of a row is scaled by 1 / sqrt(M).

    Raises:
        UserError: there is no peer, or the peers embedded different numbers of images.
    """
    shapes = [np.shape(embeddings) for embeddings in per_peer]
    if not shapes or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise UserError(f"an ensemble needs one (N, D) array a peer, all of one N, not {shapes}")
    parts = []
    for embeddings in per_peer:
        precise = np.asarray(embeddings, dtype=np.float64)
        norms = np.linalg.norm(precise, axis=1, keepdims=True)
        scale = np.where(norms == 0, 1, norms) * np.sqrt(len(per_peer))
        parts.append((precise / scale).astype(np.float32))
    return np.concatenate(parts, axis=1)
