"""Images that are perhaps mislabelled: their nearest images agree on another class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ray_dmml.evaluation.retrieval import retrieve
from ray_dmml.report.data import Suspect
from ray_dmml.report.gallery import Retrievals

NUM_VOTES, MIN_VOTES = 5, 3
"""Nearest images that vote, and votes for one other class that make an image a suspect."""

CLEAR = 4
"""How many times as near to the other class an image must be to be a clear case."""

NUM_SUSPECTS, MAX_CHECKED = 16, 2000


def suspects(retrievals: Retrievals, embeddings: Mapping[str, np.ndarray]) -> tuple[int, int, list[Suspect]]:
    """The number of suspects, that of the clear cases among them, and the most suspicious ones.

    An image is one if at least MIN_VOTES of its NUM_VOTES nearest images are of one other class, and are in the mean
    more similar to it than any image of its own class. It is a clear case if all vote so, every system agrees, and the
    squared distance to them is at most 1 / CLEAR of that to its own class; a difficult image is between classes. The
    order is by clearness, then by the margin of the two similarities. Where queries and gallery are apart, images of
    both are compared with all images: labels are wrong in either.

    Args:
        embeddings: (N, D) of the main system, unit length, and perhaps of others whose agreement is named.
    """
    if retrievals.images.gallery is not None:
        everything = replace(retrievals.images, query=None, gallery=None)
        systems = {
            name: retrieve(vectors, everything, recall_at=(1,), keep=NUM_VOTES, all_metrics=False)
            for name, vectors in embeddings.items()
        }
        retrievals = replace(retrievals, images=everything, systems=systems)
    images, system, points = retrievals.images, retrievals.systems[retrievals.main], embeddings[retrievals.main]
    near = system.neighbors[:, :NUM_VOTES]
    labels = np.where(near >= 0, images.labels[near], -1)
    votes = (labels[:, :, None] == labels[:, None, :]).sum(axis=2)
    votes[(labels < 0) | (labels == retrievals.query_labels[:, None])] = 0
    best = votes.argmax(axis=1)
    rows = np.arange(len(labels))
    other, count = labels[rows, best], votes[rows, best]
    candidates = np.flatnonzero(count >= MIN_VOTES)
    is_voter = labels == other[:, None]
    similarity = np.where(is_voter, system.similarities[:, : near.shape[1]], 0).sum(axis=1) / np.maximum(count, 1)
    candidates = candidates[np.argsort(-similarity[candidates], kind="stable")]
    ranked = []
    for position in candidates[:MAX_CHECKED].tolist():
        query = int(retrievals.queries[position])
        own = np.flatnonzero(images.labels == images.labels[query])
        own = own[own != query]
        if images.exclude is not None:
            own = own[images.exclude[own] != images.exclude[query]]
        to_own = points[own] @ points[query]
        nearest = int(to_own.argmax())
        if (margin := float(similarity[position] - to_own[nearest])) > 0:
            others = [name for name in retrievals.systems if name != retrievals.main]
            agreeing = [name for name in others if _agrees(retrievals, name, position, int(other[position]))]
            is_near = CLEAR * (1 - similarity[position]) <= 1 - to_own[nearest]
            is_clear = bool(is_near) and agreeing == others and count[position] == near.shape[1]
            ranked.append((is_clear, margin, position, int(own[nearest]), float(to_own[nearest]), agreeing))
    ranked.sort(key=lambda entry: (not entry[0], -entry[1]))
    found = []
    for is_clear, _, position, own_image, own_similarity, agreeing in ranked[:NUM_SUSPECTS]:
        query, label = int(retrievals.queries[position]), int(other[position])
        own_label = int(images.labels[query])
        evidence = f"{count[position]} of its {near.shape[1]} nearest images are of this class"
        if agreeing:
            evidence += f", also by {' and '.join(agreeing)} alone"
        evidence += (
            f". Similarity to them {similarity[position]:.2f}, to the nearest of its own class {own_similarity:.2f}"
        )
        pairs = zip(near[position].tolist(), system.similarities[position].tolist(), strict=False)
        tiles = tuple(retrievals.tile(image, own_label, value) for image, value in pairs if image >= 0)
        own_tile = retrievals.tile(own_image, own_label, own_similarity)
        suspect = Suspect(retrievals.tile(query), retrievals.class_name(label), evidence, tiles, own_tile, is_clear)
        found.append(suspect)
    return len(ranked), sum(entry[0] for entry in ranked), found


def _agrees(retrievals: Retrievals, system: str, position: int, label: int) -> bool:
    near = retrievals.systems[system].neighbors[position, :NUM_VOTES]
    return bool((retrievals.images.labels[near[near >= 0]] == label).sum() >= MIN_VOTES)
