"""Pictures of what a run retrieves: queries, and the images nearest to them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ray_dmml.errors import UserError
from ray_dmml.evaluation.evaluation import ENSEMBLE, Evaluation
from ray_dmml.training.evaluate import embed_run
from ray_dmml.training.pictures import draw_queries, worst_first
from ray_dmml.training.views import choose_images


def draw_neighbors(
    run: Path | str,
    weights: str | None = None,
    *,
    data: Path | str | None = None,
    system: str | None = None,
    num_queries: int = 8,
    num_neighbors: int = 8,
    worst: bool = False,
    seed: int = 0,
    trust_code: bool = False,
) -> Image.Image:
    """Draws queries of a run and the images that are nearest to them. A solid green frame and ✓ mean the query's class,
    a dashed red frame and ✗ mean another class, as in the report. A notebook shows the picture if it is the last value
    of a cell.

    The images are embedded again, in this process.

    Args:
        run: as in :func:`~ray_dmml.training.evaluate.evaluate`.
        weights: the same.
        data: the same.
        system: name of a peer, or ``ensemble``. None: the ensemble, or the only peer.
        num_queries: number of rows.
        num_neighbors: number of images in a row beside the query.
        worst: the queries whose first image of their class comes last. Otherwise they are random ones of different
            classes.
        seed: another seed gives other random queries.
        trust_code: as in :func:`~ray_dmml.training.evaluate.evaluate`.

    Returns:
        A picture with a row for each query.

    Raises:
        UserError: there is no such system, or a number is below 1; and as in
            :func:`~ray_dmml.training.evaluate.evaluate`.
    """
    for name, number in (("num_queries", num_queries), ("num_neighbors", num_neighbors)):
        if number < 1:
            raise UserError(f"{name} is {number}; allowed: 1 or more")
    embedded = embed_run(run, weights, data=data, trust_code=trust_code)
    images, frozen = embedded.images, embedded.config.cohort.frozen_peers
    evaluation = Evaluation.of(embedded.embeddings, images, recall_at=[1], teachers=frozen, keep=num_neighbors)
    systems = evaluation.systems
    system = system or (ENSEMBLE if ENSEMBLE in systems else next(iter(systems)))
    if system not in systems:
        raise UserError(f"the run has no {system!r}; it has {', '.join(systems)}")
    retrieval = systems[system]
    if worst:
        rows = worst_first(retrieval)[:num_queries]
    else:
        rows = choose_images(images.labels[retrieval.queries], num_queries, seed)
    return draw_queries(retrieval, images, rows)
