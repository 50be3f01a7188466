"""Batches of P classes x K images."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_dmml.data.sampler import ClassBalancedSampler
from ray_dmml.errors import UserError

sizes = st.lists(st.integers(1, 30), min_size=2, max_size=25)


def labels_of(class_sizes: list[int]) -> np.ndarray:
    """Labels in a shuffled order, so that no test relies on sorted classes."""
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    return np.random.default_rng(0).permutation(labels)


def epoch_of(sampler: ClassBalancedSampler, epoch: int = 0) -> np.ndarray:
    start = epoch * sampler.steps_per_epoch
    return np.stack([sampler.batch(start + i) for i in range(sampler.steps_per_epoch)])


@settings(deadline=None, max_examples=150)
@given(sizes, st.integers(2, 8), st.integers(2, 6), st.integers(0, 3), st.integers(0, 2))
def test_an_epoch_keeps_its_promises(class_sizes, num_classes, per_class, seed, epoch):
    """A batch has P*K different images of P or more classes, side by side; an epoch has every image."""
    labels = labels_of(class_sizes)
    assume(len(class_sizes) >= num_classes and max(class_sizes) >= 2)
    assume(len(labels) >= num_classes * per_class)
    sampler = ClassBalancedSampler(labels, num_classes, per_class, seed)
    batches = epoch_of(sampler, epoch)
    assert batches.dtype == np.int64
    assert batches.shape == (sampler.steps_per_epoch, num_classes * per_class)
    assert sampler.batch_size == num_classes * per_class
    for batch in batches:
        assert len(set(batch.tolist())) == num_classes * per_class
        drawn = labels[batch]
        assert len(set(drawn.tolist())) >= num_classes
        assert np.sum(drawn[1:] != drawn[:-1]) + 1 == len(set(drawn.tolist()))
    assert set(batches.ravel().tolist()) == set(range(len(labels)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(4, 30), min_size=16, max_size=25), st.integers(0, 3))
def test_full_classes_give_exactly_k(class_sizes, seed):
    """With 2P classes of K images or more, every batch is exactly P classes with K images each."""
    labels = labels_of(class_sizes)
    for batch in epoch_of(ClassBalancedSampler(labels, 8, 4, seed)):
        counts = np.unique(labels[batch], return_counts=True)[1]
        assert counts.tolist() == [4] * 8


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 9), min_size=20, max_size=40), st.integers(2, 5), st.integers(0, 3))
def test_no_image_is_alone(class_sizes, per_class, seed):
    """If all classes have two images and there are more than P, every image has a positive. One image of an odd
    batch has none if no class of the batch has an image to spare."""
    labels = labels_of(class_sizes)
    sizes = np.bincount(labels)
    assume(len(labels) >= 5 * per_class)
    for batch in epoch_of(ClassBalancedSampler(labels, 5, per_class, seed)):
        classes, counts = np.unique(labels[batch], return_counts=True)
        if counts.min() == 1:
            assert (counts == 1).sum() == 1 and len(batch) % 2
            others = counts > 1
            assert (counts[others] == sizes[classes[others]]).all()


def test_a_batch_depends_on_seed_and_step_alone():
    """A step gives the same batch in any order of steps and from another object."""
    labels = labels_of([7, 3, 12, 5, 9, 1, 4])
    one, other = ClassBalancedSampler(labels, 3, 4, 5), ClassBalancedSampler(labels, 3, 4, 5)
    steps = range(5 * one.steps_per_epoch)
    forward = [one.batch(step).tolist() for step in steps]
    scattered = np.random.default_rng(1).permutation(steps).tolist()
    for step in scattered:
        assert other.batch(step).tolist() == forward[step]


def test_seeds_and_epochs_differ():
    """Another seed, and another epoch of one seed, draw other batches."""
    labels = labels_of([20] * 10)
    first = ClassBalancedSampler(labels, 4, 5, 0)
    second = ClassBalancedSampler(labels, 4, 5, 1)
    assert not np.array_equal(epoch_of(first, 0), epoch_of(first, 1))
    assert not np.array_equal(epoch_of(first, 0), epoch_of(second, 0))


def test_a_fitting_set_is_seen_exactly_once():
    """10 classes of 20 images in batches of 5 x 4: 10 batches, no image twice in an epoch."""
    sampler = ClassBalancedSampler(labels_of([20] * 10), 5, 4, 0)
    assert sampler.steps_per_epoch == 10
    assert sorted(epoch_of(sampler).ravel().tolist()) == list(range(200))


def test_a_huge_class_bounds_the_epoch():
    """An epoch has as many batches as the largest class has groups, not more."""
    sampler = ClassBalancedSampler(labels_of([400] + [10] * 8), 4, 4, 0)
    assert sampler.steps_per_epoch == 100


class CountingGenerator(np.random.Generator):
    """Counts the items of everything that is drawn or shuffled."""

    items = 0

    def random(self, size: int) -> np.ndarray:
        CountingGenerator.items += size
        return super().random(size)

    def permutation(self, x: object) -> np.ndarray:
        drawn = super().permutation(x)
        CountingGenerator.items += len(drawn)
        return drawn

    def choice(self, a: object, size: int, replace: bool) -> np.ndarray:
        CountingGenerator.items += size
        return super().choice(a, size, replace=replace)


@pytest.mark.parametrize(
    ("class_sizes", "num_classes"),
    [([1200] + [2] * 50, 16), ([1200, 2], 2), ([1200, 900, 3], 3), ([400, 800] + [1] * 90, 16), ([20] * 60, 16)],
)
def test_the_work_of_an_epoch_is_linear(
    class_sizes: list[int], num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn in an epoch are a few items for each image and each place in a batch."""
    labels = labels_of(class_sizes)
    monkeypatch.setattr(np.random, "Generator", CountingGenerator)
    CountingGenerator.items = 0
    sampler = ClassBalancedSampler(labels, num_classes, 4, 0)
    epoch_of(sampler)
    assert CountingGenerator.items < 5 * (len(labels) + sampler.steps_per_epoch * sampler.batch_size)


@pytest.mark.parametrize("class_sizes", [[20_000, 2, 2], [20_000, 15_000, 3], [20_000] + [1] * 90])
def test_no_batch_looks_at_all_images(class_sizes: list[int]) -> None:
    """Once the epoch is planned, the memory of a batch does not depend on the largest class."""
    labels = labels_of(class_sizes)
    sampler = ClassBalancedSampler(labels, 3, 4, 0)
    sampler.batch(0)
    tracemalloc.start()
    try:
        for step in range(1, 200):
            sampler.batch(step)
        assert tracemalloc.get_traced_memory()[1] < labels.nbytes / 3
    finally:
        tracemalloc.stop()


def test_classes_meet_many_others():
    """In one epoch a class shares batches with nearly every other class, not with neighbours only."""
    labels = labels_of([60] * 40)
    met = set()
    for batch in epoch_of(ClassBalancedSampler(labels, 8, 4, 0)):
        present = set(labels[batch].tolist())
        met |= present if 0 in present else set()
    assert len(met) >= 35


def test_small_classes_are_counted():
    """small_classes is the number of classes with fewer than K images."""
    assert ClassBalancedSampler(labels_of([3, 4, 5, 1, 8]), 2, 4, 0).small_classes == 2


def test_what_cannot_be_drawn_is_refused():
    """Too few classes, too few images and no positive pair have different messages."""
    with pytest.raises(UserError, match="classes_per_batch is 16 but only 12 classes"):
        ClassBalancedSampler(labels_of([5] * 12), 16, 4, 0)
    with pytest.raises(UserError, match="no batch holds a positive pair"):
        ClassBalancedSampler(labels_of([1] * 12), 4, 2, 0)
    with pytest.raises(UserError, match="64 images needs more than the 32"):
        ClassBalancedSampler(labels_of([2] * 16), 16, 4, 0)
