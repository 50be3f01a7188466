"""The ensemble embedding: its similarities are the means of the peers' similarities."""

from __future__ import annotations

import numpy as np
import pytest
from retrieval_samples import unit

from ray_dmml.errors import UserError
from ray_dmml.evaluation.ensemble import ensemble_embedding


def test_ensemble_similarity_is_the_mean_of_the_peers() -> None:
    """Rows of length 1, peers of different sizes and scales in order, float32."""
    peers = [unit(20, 8), 3 * unit(20, 5, seed=1), unit(20, 12, seed=2)]
    joint = ensemble_embedding(peers)
    assert joint.shape == (20, 25) and joint.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(joint, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(joint[:, :8] * np.sqrt(3), peers[0], atol=1e-6)
    mean = (peers[0] @ peers[0].T + peers[1] @ peers[1].T / 9 + peers[2] @ peers[2].T) / 3
    np.testing.assert_allclose(joint @ joint.T, mean, atol=1e-6)


def test_ensemble_keeps_a_zero_row_finite() -> None:
    """The zero embedding of a dead peer adds nothing, and no NaN."""
    dead = unit(4, 8)
    dead[2] = 0
    joint = ensemble_embedding([dead, unit(4, 8, seed=1)])
    assert np.isfinite(joint).all()
    assert (joint[2, :8] == 0).all()


def test_wrong_shapes_are_refused() -> None:
    """Different numbers of images, and no peer."""
    for per_peer in ([unit(4, 8), unit(2, 8)], []):
        with pytest.raises(UserError, match="all of one N"):
            ensemble_embedding(per_peer)
