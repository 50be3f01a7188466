"""Batches of P classes x K images, a pure function of (seed, step)."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import NamedTuple

import numpy as np

from ray_dmml.errors import UserError
from ray_dmml.randomness import derive_seed

Batch = dict[int, np.ndarray]  # class: the indices of its images in the batch


class _Plan(NamedTuple):
    """The groups of each batch of an epoch.

    Attributes:
        images: (N,) all images by class, those of a class shuffled.
        classes: (G,) the class of each group, by batch.
        numbers: (G,) which group of its class it is.
        starts: (steps + 1,) the first group of each batch.
    """

    images: np.ndarray
    classes: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray


class ClassBalancedSampler:
    """Batches of P classes x K images in which every image of an epoch appears at least once.

    The images of each class are shuffled and cut into groups of K. Further images of the class complete the last group.
    A class with fewer than K images is one short group. The groups are dealt to the batches of the epoch so that no
    batch gets two of one class, and further images fill the batches that are not full. So every batch has exactly P x K
    different images of at least P classes, and the images of a class are side by side.

    The images that complete groups and batches appear twice in an epoch. An epoch has at least as many batches as the
    largest class has groups. In a very imbalanced set that class is therefore in every batch, and the images of small
    classes appear many times. The work of an epoch is linear in its batches and images, whatever the sizes of the
    classes: groups are dealt when the epoch begins, and a batch is filled when its step comes.

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
        self._starts: list[int] = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._fillers = np.flatnonzero(sizes >= 2), np.flatnonzero(sizes == 1)  # those with a positive pair first
        self._plans: dict[int, _Plan] = {}

    def batch(self, step: int) -> np.ndarray:
        """(P*K,) int64 indices of the images of a step, read-only. Steps may come in any order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._plan(epoch)
            newest = sorted(self._plans)[-1:]  # a prefetcher may be one epoch ahead of the trainer
            self._plans = {**{kept: self._plans[kept] for kept in newest}, epoch: plan}
        batch: Batch = {}
        for group in range(plan.starts[position], plan.starts[position + 1]):
            label, number = int(plan.classes[group]), int(plan.numbers[group])
            images = self._images_of(plan, label)
            first = number * self._per_class
            batch[label] = images[np.arange(first, first + min(self._per_class, len(images))) % len(images)]
        rng = np.random.Generator(np.random.PCG64(derive_seed("fill", self._seed, epoch, position)))
        self._fill(batch, plan, rng)
        indices = np.concatenate(list(batch.values()))
        indices.setflags(write=False)
        return indices

    def _images_of(self, plan: _Plan, label: int) -> np.ndarray:
        return plan.images[self._starts[label] : self._starts[label + 1]]

    def _count_steps(self, classes_per_batch: int) -> int:
        per_class = self._per_class
        groups = [-(-size // per_class) for size in self._sizes if size >= per_class]
        steps = max([-(-sum(groups) // classes_per_batch), *groups])
        if self.small_classes:
            # Short groups go to the emptiest batch. With this many batches it always has room.
            images = sum(groups) * per_class + sum(s for s in self._sizes if s < per_class)
            steps = max(steps, -(-images // (self.batch_size - per_class + 1)))
        return steps

    def _plan(self, epoch: int) -> _Plan:
        rng = np.random.Generator(np.random.PCG64(derive_seed("batches", self._seed, epoch)))
        images = np.lexsort((rng.random(len(self._labels)), self._labels))
        batches, classes, numbers = self._deal_full_groups(rng)
        self._deal_short_groups(batches, classes, numbers, rng)
        order = np.argsort(batches, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(batches, minlength=self.steps_per_epoch))])
        return _Plan(images, np.array(classes)[order], np.array(numbers)[order], starts)

    def _deal_full_groups(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
        """Deals the groups of each class like cards: every batch gets one before any gets another.

        Returns:
            Of each group: its batch, its class, and which group of the class it is.
        """
        batches: list[int] = []
        classes: list[int] = []
        numbers: list[int] = []
        deck: list[int] = []
        for label in rng.permutation(len(self._sizes)).tolist():
            if self._sizes[label] < self._per_class:
                continue
            num_groups = -(-self._sizes[label] // self._per_class)
            hand, deck = deck[:num_groups], deck[num_groups:]
            if len(hand) < num_groups:
                fresh = rng.permutation(self.steps_per_epoch).tolist()
                held = set(hand)
                more = [batch for batch in fresh if batch not in held][: num_groups - len(hand)]
                hand += more
                taken = set(more)
                deck = [batch for batch in fresh if batch not in taken]
            batches += hand
            classes += [label] * num_groups
            numbers += range(num_groups)
        return batches, classes, numbers

    def _deal_short_groups(
        self, batches: list[int], classes: list[int], numbers: list[int], rng: np.random.Generator
    ) -> None:
        """Puts each class of fewer than K images into the emptiest batch."""
        loads = (np.bincount(np.array(batches, np.int64), minlength=self.steps_per_epoch) * self._per_class).tolist()
        heap = [(loads[batch], tie, batch) for tie, batch in enumerate(rng.permutation(self.steps_per_epoch).tolist())]
        heapq.heapify(heap)
        for label in rng.permutation(len(self._sizes)).tolist():
            if self._sizes[label] < self._per_class:
                load, tie, batch = heap[0]
                batches.append(batch)
                classes.append(label)
                numbers.append(0)
                heapq.heapreplace(heap, (load + self._sizes[label], tie, batch))

    def _fill(self, batch: Batch, plan: _Plan, rng: np.random.Generator) -> None:
        """Fills a batch to P x K images: with further classes, then with more of its own.

        Classes with a positive pair come first. If one image is missing, it is of a class in the batch, so that it has
        positives.
        """
        missing = self.batch_size - _num_images(batch)
        for classes in self._fillers:
            if missing > 1:
                # As many as suffice, though the batch may have some of them.
                for label in rng.choice(classes, min(len(classes), missing + len(batch)), replace=False).tolist():
                    if missing > 1 and label not in batch:
                        count = min(self._per_class, self._sizes[label], missing)
                        batch[label] = rng.choice(self._images_of(plan, label), count, replace=False)
                        missing -= count
        if missing:
            self._add_own(batch, plan, missing, rng)

    def _add_own(self, batch: Batch, plan: _Plan, missing: int, rng: np.random.Generator) -> None:
        """Adds further images of the batch's classes, or of others if those have no more."""
        labels = list(batch)
        spare = np.array([self._sizes[label] - len(batch[label]) for label in labels])
        places = rng.choice(spare.sum(), min(missing, spare.sum()), replace=False)
        counts = Counter(np.searchsorted(np.cumsum(spare), places, side="right").tolist())
        for number, count in counts.items():
            had = batch[labels[number]]
            batch[labels[number]] = np.append(had, _others(self._images_of(plan, labels[number]), had, count, rng))
        if missing > len(places):
            had = np.concatenate(list(batch.values()))
            for image in _others(plan.images, had, missing - len(places), rng).tolist():
                label = int(self._labels[image])
                batch[label] = np.append(batch.get(label, plan.images[:0]), image)


def _others(images: np.ndarray, had: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws ``count`` of the images that are not among ``had``, without looking at all images."""
    drawn = rng.choice(images, len(had) + count, replace=False)
    return drawn[~np.isin(drawn, had)][:count]


def _num_images(batch: Batch) -> int:
    return sum(map(len, batch.values()))
