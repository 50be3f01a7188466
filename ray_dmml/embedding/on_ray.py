"""Embeds shards by Ray Data, with a pool of actors on all nodes."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import ActorDiedError

from ray_dmml.config.code import use_code
from ray_dmml.embedding.embedder import Dtype, Embedder
from ray_dmml.embedding.place import Place
from ray_dmml.errors import UserError
from ray_dmml.inference import SavedPeers
from ray_dmml.ray_backend.process import tune_malloc
from ray_dmml.ray_backend.session import ray_session

MEMORY_BYTES = 2**30
"""Of a node, for each actor on a CPU: its libraries, the nets and two batches."""

READERS_OF_URI, MAX_READERS = 8, 16
"""Threads that read and decode ahead. Those of a bucket mostly wait."""


@dataclass(frozen=True)
class Task:
    """What every actor does."""

    peers: SavedPeers
    is_ensemble: bool
    place: Place
    dtype: Dtype
    batch_size: int


class ShardActor:
    """Embeds shards. It has one CPU, or a GPU with its share of the CPUs."""

    def __init__(self, task: list[Any], num_readers: int) -> None:
        self._task: Task = ray.get(task[0])  # in a list: Ray would put its value into every call
        self._num_readers = num_readers
        self._embedder: Embedder | None = None
        self._failure = ""
        try:
            self._embedder = self._build()
        except UserError as error:
            self._failure = str(error)

    def __call__(self, shard: pa.Table) -> pa.Table:
        """(``number``, ``paths`` compressed) of one shard -> its rows with ``number``, or a row with ``failure``."""
        number, packed = shard["number"][0].as_py(), shard["paths"][0].as_py()
        try:
            if self._embedder is None:
                raise UserError(self._failure)
            table = self._embedder(unpack(packed))
        except UserError as error:  # Ray would add a traceback
            return pa.table({"failure": [str(error)]})
        return table.append_column("number", pa.repeat(number, table.num_rows))

    def _build(self) -> Embedder:
        task = self._task
        task.place.require()
        tune_malloc()
        use_code(task.peers.code)
        cohort = task.peers.build("cuda" if ray.get_gpu_ids() else "cpu")
        model = cohort if task.is_ensemble else next(iter(cohort.peers.values()))
        return Embedder(model, task.place, task.dtype, task.batch_size, self._num_readers)


def embed_on_ray(
    task: Task, shards: Iterable[tuple[int, list[bytes]]], concurrency: int | None
) -> Iterator[tuple[int, pa.Table]]:
    """The tables of shards, in any order. Ray is connected.

    Args:
        task: what to do.
        shards: their numbers and paths.
        concurrency: number of actors. None: one for each GPU of the cluster, or else for each CPU.

    Raises:
        UserError: the images cannot be read on a node, or no shard is finished for half an hour: a file may kill the
            decoder that reads it, again and again.
    """
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    num_cpus = _cpus_per_gpu() if num_gpus else 1
    num_readers = max(num_cpus, READERS_OF_URI if task.place.is_uri else 1)
    waits = bool(num_gpus or task.place.is_uri)  # a second shard is read meanwhile
    pool = ActorPoolStrategy(
        size=concurrency or num_gpus or _num_cpu_actors(),
        max_concurrent_calls_per_actor=2 if waits else None,
        enable_true_multi_threading=waits,
    )
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = None  # a shard is one block
    blocks = [pa.table({"number": [number], "paths": [pack(paths)]}) for number, paths in shards]
    if not blocks:
        return
    reference = ray.put(task)
    with DataContext.current(context), quiet():
        tables = ray.data.from_arrow(blocks).map_batches(
            ShardActor,
            fn_constructor_args=([reference], num_readers),
            batch_format="pyarrow",
            batch_size=None,
            compute=pool,
            num_cpus=num_cpus,
            num_gpus=1 if num_gpus else 0,
        )
        del blocks
        try:
            for table in tables.iter_batches(batch_size=None, batch_format="pyarrow"):
                if "failure" in table.column_names:
                    raise UserError(table["failure"][0].as_py())
                yield table["number"][0].as_py(), table.drop_columns("number")
        except ExecutionTimeoutError as error:
            minutes = context.execution_no_progress_timeout_s / 60
            raise UserError(f"no shard was finished for {minutes:.0f} minutes: {error}") from None
        except ActorDiedError as error:
            raise UserError(f"Ray has lost the embedding actors: {str(error).splitlines()[0]}") from error


def pack(paths: Sequence[bytes]) -> bytes:
    """Paths, compressed: those of all shards wait in Ray's object store."""
    return zlib.compress(b"\0".join(paths), 1)


def unpack(packed: bytes) -> list[bytes]:
    """The inverse of :func:`pack`."""
    return zlib.decompress(packed).split(b"\0")


@contextmanager
def quiet_session() -> Iterator[None]:
    """A Ray session whose core does not report the arguments of Ray Data's actors as an error. It does not if this
    variable is set, but then it prints that the variable is set."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(_no_stderr())
        with ray_session():
            stack.close()
            yield


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Nothing is printed to standard error, from any language."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def quiet() -> Iterator[None]:
    """Ray Data logs the plan, its versions and its own progress."""
    log = logging.getLogger("ray.data")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _num_cpu_actors() -> int:
    """One for each CPU whose node has the memory."""
    fitting = (min(node.get("CPU", 0), node.get("memory", 0) // MEMORY_BYTES) for node in _nodes())
    return max(1, int(sum(fitting)))


def _cpus_per_gpu() -> int:
    """As many as all nodes with GPUs have."""
    shares = (node.get("CPU", 0) // node["GPU"] for node in _nodes() if node.get("GPU"))
    return max(1, min(MAX_READERS, int(min(shares))))
