"""Image files to rows of a table, in one process: read, decode, embed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_dmml.data.decoding import decode_content, printable, reason_of, to_square
from ray_dmml.embedding.place import Place
from ray_dmml.errors import UserError
from ray_dmml.filesystem import without_secrets
from ray_dmml.inference import TrainedCohort, TrainedPeer

Dtype = Literal["float32", "float16"]

_AHEAD = 2  # batches that are read before they are embedded, one of them while another is embedded


class _Decoded(NamedTuple):
    """An image file: its square, and the size of the upright image; or why there is none."""

    square: Tensor | None
    width: int | None = None
    height: int | None = None
    error: str | None = None


class Stopped(Exception):
    """The embedder was closed during a call."""


def schema(size: int, dtype: Dtype) -> pa.Schema:
    """The columns of a table of embeddings (D,)."""
    number = pa.float32() if dtype == "float32" else pa.float16()
    fields = [("path", pa.string()), ("embedding", pa.list_(number, size))]
    return pa.schema([*fields, ("width", pa.int32()), ("height", pa.int32()), ("error", pa.string())])


class Embedder:
    """Embeds image files with a trained peer or cohort. Several threads may call it at a time.

    Args:
        model: the nets.
        place: where the images are.
        dtype: of the embeddings.
        batch_size: images that the nets get at a time: consecutive paths of a call.
        num_readers: threads that read and decode ahead.
        num_threads: of torch, in each thread that calls.
    """

    def __init__(
        self,
        model: TrainedPeer | TrainedCohort,
        place: Place,
        dtype: Dtype,
        batch_size: int,
        num_readers: int,
        num_threads: int = 1,
    ) -> None:
        self._model, self._place, self._dtype, self._batch_size = model, place, dtype, batch_size
        self._num_threads = num_threads
        self._readers = ThreadPoolExecutor(num_readers, "read", initializer=torch.set_num_threads, initargs=(1,))
        self._stop = Event()
        # A GPU computes one batch at a time, whoever asks for it.
        peers = model.peers.values() if isinstance(model, TrainedCohort) else [model]
        self._is_on_gpu = any(peer.net.mean.is_cuda for peer in peers)
        self._gpu = Lock()

    def __call__(self, paths: Sequence[bytes]) -> pa.Table:
        """A row for each path, in their order, see :func:`schema`.

        Raises:
            UserError: the place of the images cannot be read any more.
            Stopped: :meth:`close` was called meanwhile.
        """
        torch.set_num_threads(self._num_threads)
        embeddings = np.zeros((len(paths), self._model.size), self._dtype)
        decoded: list[_Decoded] = []
        for images in self._batches(paths):
            if self._stop.is_set():
                raise Stopped
            squares = [image.square for image in images if image.square is not None]
            if squares:
                rows = [len(decoded) + place for place, image in enumerate(images) if image.square is not None]
                embeddings[rows] = self._embed(torch.stack(squares))
            decoded += [image._replace(square=None) for image in images]
        is_missing = pa.array([image.error is not None for image in decoded])
        flat = pa.array(embeddings.reshape(-1))
        columns = {
            "path": [path.decode("utf-8", "backslashreplace") for path in paths],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, self._model.size, mask=is_missing),
            "width": [image.width for image in decoded],
            "height": [image.height for image in decoded],
            "error": [image.error for image in decoded],
        }
        return pa.table(columns, schema(self._model.size, self._dtype))

    def close(self) -> None:
        """Calls that are not finished end with :class:`Stopped` after their batch."""
        self._stop.set()
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _embed(self, squares: Tensor) -> np.ndarray:
        if not self._is_on_gpu:
            return np.asarray(self._model.embed(squares))
        with self._gpu:
            embedded = self._model.embed(squares)
            return embedded if isinstance(embedded, np.ndarray) else embedded.cpu().numpy()

    def _batches(self, paths: Sequence[bytes]) -> Iterator[list[_Decoded]]:
        pending: deque[list[Future[_Decoded]]] = deque()
        for start in range(0, len(paths), self._batch_size):
            pending.append([self._submit(path) for path in paths[start : start + self._batch_size]])
            if len(pending) == _AHEAD:
                yield [image.result() for image in pending.popleft()]
        for batch in pending:
            yield [image.result() for image in batch]

    def _submit(self, path: bytes) -> Future[_Decoded]:
        try:
            return self._readers.submit(self._read, path)
        except RuntimeError:  # the readers were shut down
            raise Stopped from None

    def _read(self, path: bytes) -> _Decoded:
        try:
            path.decode()
        except UnicodeDecodeError:
            return _Decoded(None, error="its name is not text in UTF-8")
        try:
            image = decode_content(self._place.read(os.fsdecode(path)))
            square = to_square(image, self._model.decode_size, self._model.resize)
            return _Decoded(square, image.shape[2], image.shape[1])
        except UserError:
            raise
        except Exception as error:  # a corrupt file makes decoders raise nearly anything
            return _Decoded(None, error=without_secrets(printable(reason_of(error))))


def embed_locally(
    embedder: Embedder, shards: Iterator[tuple[int, list[bytes]]], num_threads: int
) -> Generator[tuple[int, pa.Table]]:
    """The tables of shards, in order. As many threads embed a shard each, and no more than twice as many shards are in
    memory.

    Args:
        embedder: embeds one shard.
        shards: their numbers and paths.
        num_threads: threads at a time.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "embed")
    pending: deque[tuple[int, Future[pa.Table]]] = deque()
    try:
        for number, paths in shards:
            pending.append((number, pool.submit(embedder, paths)))
            if len(pending) == 2 * num_threads:
                first, table = pending.popleft()
                yield first, table.result()
        for first, table in pending:
            yield first, table.result()
    finally:
        embedder.close()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
