"""Queries of an index: the model that embeds them, and the images that are found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ray_dmml.errors import UserError
from ray_dmml.index.embeddings import Floats
from ray_dmml.index.image_index import ImageIndex
from ray_dmml.index.match import Match
from ray_dmml.inference import TrainedCohort, TrainedPeer, load_cohort
from ray_dmml.training.run_dir import RunDir


def load_embedder(
    index: ImageIndex, run: Path | str | None = None, *, device: str = "cpu", trust_code: bool = False
) -> TrainedPeer | TrainedCohort:
    """The trained peer, or the cohort for its ensemble, that embeds queries as the index's images were embedded.

    Args:
        index: the index.
        run: the folder of the run. None: where it was when the images were embedded.
        device: where the nets compute.
        trust_code: build own backbones that the run's config names.

    Raises:
        UserError: the run is not there, or its model is not that of the index.
    """
    return load_embedders([index], run, device=device, trust_code=trust_code)[0]


def load_embedders(
    indexes: Sequence[ImageIndex], run: Path | str | None = None, *, device: str = "cpu", trust_code: bool = False
) -> list[TrainedPeer | TrainedCohort]:
    """The same for several indexes of one run, which is loaded once.

    Raises:
        UserError: as above, or the indexes are of several runs.
    """
    first = indexes[0]
    info = first.info
    for other in indexes[1:]:
        if (other.info.run, other.info.weights) != (info.run, info.weights):
            raise UserError(f"the images of {other.folder} were embedded by another run than those of {first.folder}")
    place = Path(info.run if run is None else run)
    if run is None and not RunDir(place).exists():
        raise UserError(f"the run {place}, which has embedded the images, is not there; give its folder (--run)")
    cohort = load_cohort(place, info.weights, device=device, trust_code=trust_code)
    models = []
    for index in indexes:
        peer = index.info.peer
        model = cohort if peer == "ensemble" else cohort.peers.get(peer)
        if model is None or model.fingerprint != index.model:
            raise UserError(
                f"the images of {index.folder} were embedded by another model than {peer} of {place}; "
                "give the run that has embedded them (--run)"
            )
        models.append(model)
    return models


def find(
    index: ImageIndex,
    embeddings: Floats,
    k: int,
    *,
    threshold: float = -np.inf,
    own_ids: Sequence[int | None] | None = None,
    prefix: str = "",
) -> list[list[Match]]:
    """The most similar images of each query, the most similar first.

    Args:
        index: the index.
        embeddings: (Q, D) float32, of unit length.
        k: images per query; fewer where the index has fewer.
        threshold: leaves out images with a lower similarity.
        own_ids: for each query, its row in the index, which is left out, or None.
        prefix: only images whose path begins with it.
    """
    own = own_ids or [None] * len(embeddings)
    excludes = any(id is not None for id in own)
    similarities, ids = index.search(embeddings, min(k + excludes, len(index)), prefix=prefix)
    results = []
    for own_id, row_similarities, row_ids in zip(own, similarities, ids, strict=True):
        keep = ((row_ids != own_id) & (row_ids >= 0) & (row_similarities >= threshold)).nonzero()[0][:k]
        rows = zip(row_similarities[keep], index.paths(row_ids[keep]), row_ids[keep], strict=True)
        results.append([Match(n, float(s), path, int(id)) for n, (s, path, id) in enumerate(rows, 1)])
    return results
