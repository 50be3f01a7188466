"""The pictures of a run, for loggers that take them: views, worst queries, and a sample of the last embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from ray_dmml.config.parts import describe
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.decoding import printable
from ray_dmml.evaluation.retrieval import Retrieval
from ray_dmml.loggers.embeddings import THUMBNAIL, EmbeddingSample
from ray_dmml.loggers.logger import Logger
from ray_dmml.loggers.pictures import Columns, draw_sheet
from ray_dmml.randomness import derive_seed
from ray_dmml.training.views import draw_views

logger = logging.getLogger(__name__)

NUM_NEIGHBORS = 5
"""Of each of the worst queries."""
CELL = 96  # in pixels; a picture of 8 queries is then below 1 MB
MOST_EMBEDDINGS = 1000
"""In the sample. Larger ones are slow in a browser, and their images take a while to decode."""


class Pictures:
    """Makes the pictures of a run, if a logger takes them and ``train.pictures`` is not 0.

    A thread draws those of an evaluation while training goes on. One that cannot be made is a warning.
    """

    def __init__(self, config: Config, loggers: Logger) -> None:
        self._config, self._loggers = config, loggers
        self._number = config.train.pictures if loggers.takes_pictures else 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._pending: tuple[int, Future[dict[str, np.ndarray]]] | None = None
        self._has_warned = False

    def show_views(self, images: ImageSet) -> None:
        """Training images under every peer's view. They are drawn here, because random numbers of another thread would
        change those of training."""
        config, number = self._config, self._number
        self._log(0, "pictures", lambda: {"views": np.asarray(draw_views(config, images, number, largest_cell=CELL))})

    def show_worst(self, retrieval: Retrieval, images: ImageSet, step: int) -> None:
        """The worst queries of an evaluation. :meth:`hand_over` logs them once they are drawn."""
        self.hand_over()
        if self._number and self._pending is None:
            self._pending = step, self._thread.submit(draw_worst, retrieval, images, self._number)

    def hand_over(self, *, wait: bool = False) -> None:
        """Logs the worst queries that are drawn by now."""
        if self._pending is not None and (wait or self._pending[1].done()):
            (step, drawn), self._pending = self._pending, None
            self._log(step, "pictures", drawn.result)

    def show_embeddings(self, embeddings: Mapping[str, np.ndarray], images: ImageSet, step: int) -> None:
        """A sample of the embeddings of the final evaluation."""
        self._log(step, "embeddings", lambda: sample_embeddings(embeddings, images))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _log(self, step: int, key: str, make: Callable[[], Any]) -> None:
        if not self._number:
            return
        try:
            made = make()
        except Exception as error:  # such as an image that is gone by now
            if not self._has_warned:
                logger.warning("there are no pictures for the loggers (%s); training goes on", describe(error))
            self._has_warned = True
            return
        if made:
            self._loggers.log({key: made}, step)


def draw_worst(retrieval: Retrieval, images: ImageSet, number: int) -> dict[str, np.ndarray]:
    """The queries whose first right image comes last, each with its nearest images.

    Args:
        retrieval: of the ensemble, with NUM_NEIGHBORS of each query.
        images: the N images.
        number: of queries, at most.

    Returns:
        ``worst_queries``: uint8 (H, W, 3). Nothing if every query finds a right image first.
    """
    worst = [row for row in worst_first(retrieval)[:number] if retrieval.first_match[row] != 1]
    return {"worst_queries": np.asarray(draw_queries(retrieval, images, worst))} if worst else {}


def worst_first(retrieval: Retrieval) -> list[int]:
    """The rows of a retrieval, those whose first right image comes last before the others. Of equals, the one whose
    wrong image is most similar comes first."""
    rank = np.where(retrieval.first_match == 0, np.iinfo(np.int64).max, retrieval.first_match)
    order: list[int] = np.lexsort((-retrieval.similarities[:, 0], -rank)).tolist()
    return order


def draw_queries(retrieval: Retrieval, images: ImageSet, rows: Sequence[int]) -> Image.Image:
    """Draws these rows of a retrieval, each with the neighbours that it kept. ``images`` are the N images."""
    queries, neighbors = retrieval.queries[rows], retrieval.neighbors[rows]
    blank = torch.full_like(images.source.read(int(queries[0])), 255)
    columns = [
        torch.stack([images.source.read(int(index)) if index >= 0 else blank for index in column])
        for column in (queries, *neighbors.T)
    ]
    is_right = (images.labels[neighbors] == images.labels[queries][:, None]).astype(object)
    is_right[neighbors < 0] = None
    captions = tuple(str(rank) for rank in range(1, neighbors.shape[1] + 1))
    note = "tick: right, cross: wrong"
    groups = [
        Columns("query", "", ("",), (columns[0],)),
        Columns("nearest images", note, captions, tuple(columns[1:]), tuple(is_right.T.tolist())),
    ]
    names = [(images.class_names[images.labels[query]], printable(images.source.name(int(query)))) for query in queries]
    return draw_sheet(names, groups, CELL)


def sample_embeddings(embeddings: Mapping[str, np.ndarray], images: ImageSet) -> EmbeddingSample:
    """Random images of a set, at most MOST_EMBEDDINGS, with their (N, D) embeddings by each system."""
    generator = np.random.Generator(np.random.PCG64(derive_seed("projector")))
    chosen = np.sort(generator.permutation(len(images))[:MOST_EMBEDDINGS])
    side = [THUMBNAIL, THUMBNAIL]
    thumbnails = [transforms.resize(images.source.read(index), side).permute(1, 2, 0) for index in chosen.tolist()]
    return EmbeddingSample(
        {name: vectors[chosen] for name, vectors in embeddings.items()},
        [images.class_names[label] for label in images.labels[chosen]],
        [printable(images.source.name(index)) for index in chosen.tolist()],
        torch.stack(thumbnails).numpy(),
    )
