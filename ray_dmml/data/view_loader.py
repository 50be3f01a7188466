"""The images of one peer as its net takes them, made in this process or by worker processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ray_dmml.data.loader import Batch, DecodedBatches, in_chunks
from ray_dmml.data.peer_views import PeerViews
from ray_dmml.data.view_workers import ViewWorkers


class ViewLoader:
    """The peer's view of each batch, and the evaluation view of a whole split.

    Without workers, threads decode the next batch while the peer trains, and the view is made where it is asked for.
    With workers all of it happens ahead, in processes of their own. The bits are the same.

    Args:
        views: what the images are made of.
        name: the peer's name, for errors.
        num_workers: number of worker processes; 0: this process makes the images.
        decoded: decodes for this process. Peers in one process share it.
        threads: decoding threads of an evaluation in this process.
        eval_batch_size: B of evaluation, for the check of shared memory.
        pin: give images in page-locked memory, for a GPU.
        has_kept: the peer publishes what it has kept, so that it needs no images of a step.

    Raises:
        UserError: the workers cannot be started.
    """

    def __init__(
        self,
        views: PeerViews,
        name: str,
        *,
        num_workers: int,
        decoded: DecodedBatches,
        threads: int,
        eval_batch_size: int,
        pin: bool,
        has_kept: bool,
    ) -> None:
        self.views, self._decoded, self._threads, self._pin, self._has_kept = views, decoded, threads, pin, has_kept
        self._workers: ViewWorkers | None = None
        if num_workers:
            largest_batch = max(eval_batch_size, views.sampler.batch_size)
            self._workers = ViewWorkers(views, name, num_workers, largest_batch=largest_batch, pin=pin)

    def batch(self, step: int) -> Batch:
        """The peer's view of the batch of a step. Steps may come in any order; ascending order is fast.

        Raises:
            BadImageError: an image of this step cannot be read.
            WorkerLostError: a worker has died.
        """
        if self._has_kept:
            return self.views.without_images(step)
        if self._workers is not None:
            return self._workers.batch(step)
        batch = self.views.of_batch(self._decoded.batch(step))
        return batch.pin_memory() if self._pin else batch

    def chunks(self, split: str, size: int) -> Iterator[Tensor]:
        """The evaluation view of all images of a split in order, ``size`` at a time: uint8 (<= size, 3, H, H).

        Raises the same errors as :meth:`batch`.
        """
        if self._workers is not None:
            yield from self._workers.chunks(split, size)
            return
        for chunk in in_chunks(self.views.images(split), size, self._threads):
            images = self.views.eval_view(chunk)
            yield images.pin_memory() if self._pin else images

    @property
    def is_complete(self) -> bool:
        """False once a worker is lost."""
        return self._workers is None or self._workers.is_complete

    def restart(self) -> None:
        """Starts workers in the place of those of which one is lost."""
        if self._workers is not None and not self._workers.is_complete:
            self._workers.close()
            self._workers.start()

    def close(self) -> None:
        """Ends the workers. The decoding threads are the caller's."""
        if self._workers is not None:
            self._workers.close()
