"""Worker processes that make the views of a peer ahead of its steps: a ``DataLoader`` of torch.

A worker makes whole batches. Each is a function of the step, so it does not matter which worker makes it, how many
there are, or what they made before.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ray_dmml.config.code import Files, code_in_use, use_code
from ray_dmml.config.parts import describe
from ray_dmml.data.loader import Batch
from ray_dmml.data.peer_views import PeerViews
from ray_dmml.errors import UserError, WorkerLostError

SIGBUS: int | None = getattr(signal, "SIGBUS", None)
"""Ends a process whose shared memory is full; Windows has no such signal."""

BATCHES_AHEAD = 2
"""Of each worker (``prefetch_factor``)."""

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps the batches that workers hand over."""


class Chunk(NamedTuple):
    """A part of a split that is evaluated: the images ``start .. stop - 1``."""

    split: str
    start: int
    stop: int


class ViewWorkers:
    """The worker processes of one peer, which start at once.

    Args:
        views: what the images are made of.
        name: the peer's name, for errors.
        num_workers: number of processes, at least 1.
        largest_batch: number of images that are asked for at a time, at most.
        pin: hand over page-locked memory, for a GPU.

    Raises:
        UserError: the images or views cannot be sent to other processes, or shared memory is too small.
    """

    def __init__(self, views: PeerViews, name: str, num_workers: int, *, largest_batch: int, pin: bool) -> None:
        self.num_workers, self._name, self._views, self._pin = num_workers, name, views, pin
        self._image_bytes = 3 * views.view.size**2
        self._largest_batch = largest_batch
        try:
            self._tasks = _Tasks(code_in_use(), pickle.dumps(views))
        except Exception as error:  # own classes make pickle raise nearly anything
            raise UserError(
                f"{name}: its images or its view cannot be sent to worker processes ({describe(error)}): make them "
                "picklable, or set cohort.peers.*.num_workers: 0"
            ) from error
        self._require_shared_memory()
        self.start()

    def start(self) -> None:
        """Starts the processes, which import and wait for tasks."""
        self.is_complete = True
        self._order = _Order()
        self._loader = DataLoader(
            self._tasks,
            batch_size=None,  # a worker makes whole batches
            sampler=self._order,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_end_with_parent,
            prefetch_factor=BATCHES_AHEAD,
            persistent_workers=True,
            pin_memory=self._pin,
            multiprocessing_context=_context(),
            generator=torch.Generator(),  # the global one would draw a number
        )
        with _without_main(), _same_handler_of_children():
            self._results: Any = iter(self._loader)
        self._next_step: int | None = None

    def batch(self, step: int) -> Batch:
        """The view of the batch of a step. Any other step than the next one restarts the workers' queue there."""
        if step != self._next_step:
            self._begin(count(step))
        batch: Batch = self._next()
        self._next_step = step + 1
        return batch

    def chunks(self, split: str, size: int) -> Iterator[Tensor]:
        """The evaluation view of a split, ``size`` images at a time, in order."""
        num_images = len(self._views.images(split))
        chunks = [Chunk(split, start, min(start + size, num_images)) for start in range(0, num_images, size)]
        self._next_step = None
        self._begin(chunks)
        for _ in chunks:
            yield self._next()

    def close(self) -> None:
        """Ends the processes. A second call does nothing."""
        results, self._results = self._results, None
        if results is not None:
            results._shutdown_workers()  # a DataLoader has no public way to end persistent ones
            self._loader._iterator = None

    def _begin(self, tasks: Iterable[int | Chunk]) -> None:
        """Gives the workers other tasks. What they have made of the old ones is thrown away."""
        self._order.tasks = tasks
        with self._explained():
            self._results = iter(self._loader)

    def _next(self) -> Any:
        with self._explained():
            result = next(self._results)
        if isinstance(result, UserError):
            raise result
        if result is None:
            raise self._too_little_memory()
        return result

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises what a lost worker means."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:  # the last two where it dies while it hands a batch over
            self._next_step = None
            processes = self._results._workers
            wait([process.sentinel for process in processes], timeout=1.0)
            for number, process in enumerate(processes, start=1):
                if process.is_alive():
                    continue
                self.is_complete = False
                if SIGBUS is not None and process.exitcode == -SIGBUS:
                    raise self._too_little_memory() from error
                ended = f"ended with code {process.exitcode}"
                if process.exitcode is not None and process.exitcode < 0:
                    ended = f"was killed by {signal.Signals(-process.exitcode).name}"
                raise WorkerLostError(
                    f"{self._name}: view worker {number} of {len(processes)} (process {process.pid}) {ended}"
                ) from error
            raise

    def _require_shared_memory(self) -> None:
        if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < self._shared_bytes:
            raise self._too_little_memory()

    @property
    def _shared_bytes(self) -> int:
        """Of the batches that wait, and the one that is used."""
        return (self.num_workers * BATCHES_AHEAD + 1) * self._largest_batch * self._image_bytes

    def _too_little_memory(self) -> UserError:
        total, _, free = (amount / 2**20 for amount in shutil.disk_usage(SHARED_MEMORY))
        needed = self._shared_bytes / 2**20
        return UserError(
            f"{self._name}: {self.num_workers} view workers need {needed:.0f} MiB of shared memory, and "
            f"{SHARED_MEMORY} has {total:.0f} MiB, of which {free:.0f} are free: give the container more "
            "(docker run --shm-size=8g), or set cohort.peers.*.num_workers to fewer, or to 0"
        )


class _Tasks(Dataset[Any]):
    """Does a task: a step of training (int), or a chunk of an evaluation. It is sent to the workers as bytes, so that
    they first make the files of the setting `code` importable."""

    def __init__(self, code: Files, content: bytes) -> None:
        self._code, self._content = code, content
        self._views: PeerViews | None = None

    def __getitem__(self, task: int | Chunk) -> Batch | Tensor | UserError | None:
        """A mistake of the user's is returned, because torch would put a traceback into its message. None: the result
        has no room in shared memory."""
        if self._views is None:
            use_code(self._code)
            self._views = pickle.loads(self._content)
        try:
            result = self._views.of_images(*task) if isinstance(task, Chunk) else self._views.of_step(task)
        except UserError as error:
            return error
        return result if _share(result) else None


class _Order(Sampler[Any]):
    """The tasks that the workers are to do next."""

    def __init__(self) -> None:
        self.tasks: Iterable[int | Chunk] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)


def _share(result: Batch | Tensor) -> bool:
    """Moves the tensors to shared memory; False if they have no room. A thread would do it later, and fail unseen."""
    try:
        for tensor in (result,) if isinstance(result, Tensor) else (result.images, result.labels, result.indices):
            tensor.share_memory_()
        return True
    except RuntimeError as error:
        if "shared memory" in str(error):
            return False
        raise


def _unchanged(result: Any) -> Any:
    return result


def _end_with_parent(worker: int) -> None:
    """torch's own watch sees the server of forks, which lives as long as its workers. Ctrl-C reaches them, too, while
    their parent still needs batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _context() -> Any:
    """How processes start. A fork of this one would inherit the threads of torch and Ray, which then hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for all workers
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    """Hides the user's script, which each worker would otherwise run again. They need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _same_handler_of_children() -> Iterator[None]:
    """Undoes torch's handler of SIGCHLD. It raises the death of a worker wherever this process just computes;
    torch also finds it, within five seconds, where a batch is awaited."""
    if not hasattr(signal, "SIGCHLD"):  # Windows, where torch sets none
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
