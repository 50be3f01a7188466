"""Batches of P classes x K images, a pure function of (seed, step)."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np

from ray_dmml.errors import UserError
from ray_dmml.randomness import derive_seed

Images = list[np.ndarray]  # the indices of each class's images
Batch = dict[int, np.ndarray]  # class: the indices of its images in the batch


class ClassBalancedSampler:
    """Batches of P classes x K images in which every image of an epoch appears at least once.

    The images of each class are shuffled and cut into groups of K. Further images of the class complete the last group.
    A class with fewer than K images is one short group. The groups are dealt to the batches of the epoch so that no
    batch gets two of one class, and further images fill the batches that are not full. So every batch has exactly P x K
    different images of at least P classes, and the images of a class are side by side.

    The images that complete groups and batches appear twice in an epoch. An epoch has at least as many batches as the
    largest class has groups. In a very imbalanced set that class is therefore in every batch, and the images of small
    classes appear many times.

    Args:
        labels: (N,) integer class of each image.
        classes_per_batch: P.
        images_per_class: K.
        seed: determines the permutations of the epochs.

    Attributes:
        batch_size: P x K.
        small_classes: number of classes with fewer than K images.
        steps_per_epoch: batches in an epoch, the same in all epochs.

    Raises:
        UserError: there are fewer classes than P, fewer images than P x K, or no class has two images.
    """

    def __init__(self, labels: np.ndarray, classes_per_batch: int, images_per_class: int, seed: int) -> None:
        _, self._labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        self._sizes: list[int] = sizes.tolist()
        self._per_class, self._seed = images_per_class, seed
        self.batch_size: int = classes_per_batch * images_per_class
        self.small_classes: int = int(np.sum(sizes < images_per_class))
        if len(sizes) < classes_per_batch:
            raise UserError(
                f"data.classes_per_batch is {classes_per_batch} but only {len(sizes)} classes are trained on "
                "(held-out validation classes are not); lower it to that or less"
            )
        if images_per_class < 2 or sizes.max() < 2:
            raise UserError(
                f"data.images_per_class is {images_per_class} and the largest training class has "
                f"{sizes.max()}: both must be at least 2, or no batch holds a positive pair"
            )
        if len(labels) < self.batch_size:
            raise UserError(
                f"a batch of {classes_per_batch} x {images_per_class} (data.classes_per_batch x data.images_per_class) "
                f"= {self.batch_size} images needs more than the {len(labels)} training images there are"
            )
        self.steps_per_epoch: int = self._count_steps(classes_per_batch)
        self._plans: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> np.ndarray:
        """(P*K,) int64 indices of the images of a step, read-only. Steps may come in any order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._plan(epoch)
            newest = sorted(self._plans)[-1:]  # a prefetcher may be one epoch ahead of the trainer
            self._plans = {**{kept: self._plans[kept] for kept in newest}, epoch: plan}
        return plan[position]

    def _count_steps(self, classes_per_batch: int) -> int:
        per_class = self._per_class
        groups = [-(-size // per_class) for size in self._sizes if size >= per_class]
        steps = max([-(-sum(groups) // classes_per_batch), *groups])
        if self.small_classes:
            # Short groups go to the emptiest batch. With this many batches it always has room.
            images = sum(groups) * per_class + sum(s for s in self._sizes if s < per_class)
            steps = max(steps, -(-images // (self.batch_size - per_class + 1)))
        return steps

    def _plan(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, P*K) int64."""
        rng = np.random.Generator(np.random.PCG64(derive_seed("batches", self._seed, epoch)))
        shuffled = np.lexsort((rng.random(len(self._labels)), self._labels))
        images = np.split(shuffled, np.cumsum(self._sizes)[:-1])
        batches: list[Batch] = [{} for _ in range(self.steps_per_epoch)]
        self._deal_full_groups(batches, images, rng)
        self._deal_short_groups(batches, images, rng)
        self._fill(batches, images, rng)
        plan = np.stack([np.concatenate(list(batch.values())) for batch in batches])
        plan.setflags(write=False)
        return plan

    def _deal_full_groups(self, batches: list[Batch], images: Images, rng: np.random.Generator) -> None:
        """Deals the groups of each class like cards: every batch gets one before any gets another."""
        deck: list[int] = []
        for label in rng.permutation(len(images)).tolist():
            if self._sizes[label] < self._per_class:
                continue
            num_groups = -(-self._sizes[label] // self._per_class)
            groups = np.resize(images[label], (num_groups, self._per_class))  # wraps around
            hand, deck = deck[:num_groups], deck[num_groups:]
            if len(hand) < num_groups:
                fresh = rng.permutation(len(batches)).tolist()
                held = set(hand)
                more = [batch for batch in fresh if batch not in held][: num_groups - len(hand)]
                hand += more
                taken = set(more)
                deck = [batch for batch in fresh if batch not in taken]
            for batch, group in zip(hand, groups, strict=True):
                batches[batch][label] = group

    def _deal_short_groups(self, batches: list[Batch], images: Images, rng: np.random.Generator) -> None:
        """Puts each class of fewer than K images into the emptiest batch."""
        order = rng.permutation(len(batches)).tolist()
        heap = [(_num_images(batches[batch]), tie, batch) for tie, batch in enumerate(order)]
        heapq.heapify(heap)
        for label in rng.permutation(len(images)).tolist():
            if self._sizes[label] < self._per_class:
                load, tie, batch = heap[0]
                batches[batch][label] = images[label]
                heapq.heapreplace(heap, (load + self._sizes[label], tie, batch))

    def _fill(self, batches: list[Batch], images: Images, rng: np.random.Generator) -> None:
        """Fills every batch to P x K images: with further classes, then with more of its own.

        Classes are taken in turn, those with a positive pair first. If one image is missing, it is of a class in the
        batch, so that it has positives.
        """
        order = rng.permutation(len(images)).tolist()
        turns = [
            deque(label for label in order if self._sizes[label] >= 2),
            deque(label for label in order if self._sizes[label] == 1),
        ]
        for batch in batches:
            missing = self.batch_size - _num_images(batch)
            for turn in turns:
                passed = []
                while missing > 1 and turn:
                    label = turn.popleft()
                    passed.append((label in batch, label))
                    if label in batch:
                        continue
                    count = min(self._per_class, self._sizes[label], missing)
                    batch[label] = rng.permutation(images[label])[:count]
                    missing -= count
                # Classes that were passed over keep their place in the queue; the others go to its end.
                turn.extendleft(label for had, label in reversed(passed) if had)
                turn.extend(label for had, label in passed if not had)
            if missing:
                self._add_own(batch, images, missing, rng)

    def _add_own(self, batch: Batch, images: Images, missing: int, rng: np.random.Generator) -> None:
        """Adds further images of the batch's classes, or of others if those have no more."""
        had = np.concatenate(list(batch.values()))
        own = np.concatenate([images[label] for label in batch])
        spare = rng.permutation(np.setdiff1d(own, had))[:missing]
        if len(spare) < missing:
            others = np.delete(np.arange(len(self._labels)), own)  # in order, without sorting all
            spare = np.concatenate([spare, rng.permutation(others)[: missing - len(spare)]])
        for image in spare.tolist():
            label = int(self._labels[image])
            batch[label] = np.append(batch.get(label, images[label][:0]), image)


def _num_images(batch: Batch) -> int:
    return sum(map(len, batch.values()))
