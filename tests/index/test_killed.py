"""A process that is killed while it changes an index."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from embedded import unit_vectors, write_embeddings

from ray_dmml import build_index, load_index, remove_rows


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_the_index_is_the_one_before_or_after_a_change(tmp_path: Path, kind: str) -> None:
    """It always loads, with the rows that it had but for those removed in their order. No file is left over."""
    vectors = unit_vectors(2000)
    paths = write_embeddings(tmp_path, vectors)
    build_index(tmp_path, kind=kind, recall=0.5)  # type: ignore[arg-type]
    rng = random.Random(0)
    for _ in range(8):
        first = 2000 - len(load_index(tmp_path))
        child = os.fork()
        if child == 0:
            try:
                for path in paths[first:1990]:
                    remove_rows(tmp_path, [path])
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while len(load_index(tmp_path)) == 2000 - first and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        index = load_index(tmp_path)
        ids = np.arange(2000 - len(index), 2000)
        assert index.rows["id"].to_numpy().tolist() == ids.tolist()
        similarities, found = index.search(vectors[ids[:5]], 1)
        assert np.allclose(similarities, 1, atol=1e-6) and found[:, 0].tolist() == ids[:5].tolist()
    assert first >= 7
    remove_rows(tmp_path, paths[-1:])
    ours = [name for name in os.listdir(tmp_path) if name.startswith(("index", "rows"))]
    assert len(ours) == 3 and "index.json" in ours
