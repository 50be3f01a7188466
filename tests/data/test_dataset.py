"""Sets of images, and how they are split by class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dmml.data.dataset import FileImages, ImageSet, Splits, hold_out_classes
from ray_dmml.data.sampler import ClassBalancedSampler
from ray_dmml.errors import UserError


class Numbers:
    """An image source whose pixels are the image's index."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"image{self.indices[index]}"

    def read(self, index: int) -> torch.Tensor:
        return torch.full((3, 2, 2), self.indices[index], dtype=torch.uint8)

    def subset(self, indices: Sequence[int]) -> Numbers:
        return Numbers([self.indices[index] for index in indices])


def numbered(class_sizes: list[int], query=None, gallery=None) -> ImageSet:
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    names = tuple(f"class{i}" for i in range(len(class_sizes)))
    return ImageSet(Numbers(range(len(labels))), labels, names, query, gallery)


def names_of(images: ImageSet) -> list[str]:
    return [images.source.name(i) for i in range(len(images))]


def test_subset_renumbers_everything():
    """Classes, queries and gallery of a subset (of a subset) still name the same images, which keep what they exclude
    and their categories."""
    images = numbered([2, 3, 2], query=np.array([0, 2, 5]), gallery=np.array([1, 3, 4, 6]))
    images = replace(images, exclude=np.array([9, 9, 8, 7, 8, 6, 5]), categories=tuple("aabbccc"))
    cut = images.subset([6, 5, 4, 2, 3])
    assert cut.exclude.tolist() == [5, 6, 8, 8, 7] and cut.categories == ("c", "c", "c", "b", "b")
    assert names_of(cut) == ["image6", "image5", "image4", "image2", "image3"]
    assert cut.class_names == ("class1", "class2") and cut.labels.tolist() == [1, 1, 0, 0, 0]
    assert [cut.source.name(q) for q in cut.query] == ["image2", "image5"]
    assert [cut.source.name(g) for g in cut.gallery] == ["image3", "image4", "image6"]
    again = cut.subset([3, 0])
    assert names_of(again) == ["image2", "image6"]
    assert [again.source.read(i)[0, 0, 0].item() for i in range(2)] == [2, 6]
    assert again.query.tolist() == [0] and again.gallery.tolist() == [1]
    assert numbered([2, 2]).subset([0, 2]).query is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 6), min_size=4, max_size=20), st.floats(0.01, 0.9), st.integers(0, 9))
def test_held_out_classes_are_disjoint_and_complete(class_sizes, fraction, seed):
    """Both parts together are the whole, no class is in both, and the count is as stated."""
    images = numbered(class_sizes)
    held = max(2, round(fraction * len(class_sizes)))
    if len(class_sizes) - held < 2:
        with pytest.raises(UserError, match=r"data\.validation_fraction=0"):
            hold_out_classes(images, fraction, seed)
        return
    rest, validation = hold_out_classes(images, fraction, seed)
    assert validation.num_classes == held
    assert not set(rest.class_names) & set(validation.class_names)
    assert sorted(names_of(rest) + names_of(validation)) == sorted(names_of(images))
    for part in (rest, validation):
        for index in range(len(part)):
            number = int(part.source.name(index).removeprefix("image"))
            assert part.class_names[part.labels[index]] == f"class{images.labels[number]}"


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.booleans(), st.randoms(use_true_random=False))
def test_the_evaluated_queries_are_counted(classes: list[int], all_against_all: bool, random) -> None:
    """Those for which a loop over the gallery finds another image of the class."""
    labels = np.unique(classes, return_inverse=True)[1]
    indices = range(len(labels))
    query, gallery = ([i for i in indices if random.random() < 0.6] for _ in range(2))
    if all_against_all:
        query = gallery = list(indices)
    names = tuple(map(str, range(labels.max() + 1)))
    flags = () if all_against_all else (np.array(query, np.int64), np.array(gallery, np.int64))
    images = ImageSet(Numbers(indices), labels, names, *flags)
    expected = sum(any(g != q and labels[g] == labels[q] for g in gallery) for q in query)
    assert images.num_evaluated() == expected and images.can_be_evaluated() == (expected > 0)


def test_holding_out_follows_its_seed():
    """The same seed holds out the same classes, another seed others, fraction 0 none."""
    images = numbered([3] * 30)
    chosen = [hold_out_classes(images, 0.3, seed)[1].class_names for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert hold_out_classes(images, 0.0, 0) == (images, None)
    with pytest.raises(UserError, match="cannot be evaluated"):
        hold_out_classes(numbered([1] * 10), 0.2, 0)


@settings(deadline=None)
@given(st.integers(6, 40), st.sampled_from([0.1, 0.2, 0.25, 0.34, 0.5]), st.integers(0, 5))
def test_folds_hold_out_every_class(num_classes: int, fraction: float, seed: int) -> None:
    """Together the folds hold out all classes, and all folds but the last are disjoint."""
    images = numbered([2] * num_classes)
    held: list[set[str]] = []
    while len(set().union(*held)) < num_classes:
        rest, validation = hold_out_classes(images, fraction, seed, len(held))
        assert validation is not None
        assert not set(rest.class_names) & set(validation.class_names)
        assert len(rest.class_names) + len(validation.class_names) == num_classes
        held.append(set(validation.class_names))
        assert len(held) <= num_classes
    size = max(2, round(fraction * num_classes))
    assert len(held) == -(-num_classes // size)
    whole = held[: num_classes // size]
    assert sum(map(len, whole)) == len(set().union(*whole))


@pytest.mark.parametrize("sizes", [[2] * 100_000, [1] * 99_000 + [2] * 1000])
def test_100_000_classes_are_used(sizes: list[int]) -> None:
    """The sampler and the held-out classes take seconds."""
    began = time.monotonic()
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert len(set(ClassBalancedSampler(labels, 16, 4, seed=0).batch(0).tolist())) == 64
    names = tuple(map(str, range(len(sizes))))
    files = FileImages(Path(), ["x.png"] * len(labels), 8)
    rest, held = hold_out_classes(ImageSet(files, labels, names), 0.2, 0)
    assert held is not None and held.num_classes == 20_000 and rest.num_classes == 80_000
    assert time.monotonic() - began < 30


def test_a_digest_is_of_names_classes_and_their_order(tmp_path: Path) -> None:
    """It also covers queries and gallery, and neither the folder of the images nor the object."""

    def labelled(labels: list[int], order: tuple[int, ...] = (0, 1, 2, 3), **more) -> ImageSet:
        paths = [f"{index}.png" for index in order]
        return ImageSet(FileImages(tmp_path, paths, 8), np.array(labels), ("a", "b"), **more)

    images = labelled([0, 0, 1, 1])
    elsewhere = replace(images, source=FileImages(tmp_path / "x", images.source.paths, 8))
    assert elsewhere.digest() == images.digest() == images.subset(range(4)).digest()
    first, second = np.array([0]), np.array([1])
    others = [
        images.subset([1, 0, 2, 3]),
        images.subset([0, 1, 2]),
        labelled([0, 0, 1, 1], (0, 1, 3, 2)),
        labelled([0, 1, 0, 1]),
        replace(images, query=first, gallery=second),
        replace(images, query=second, gallery=first),
    ]
    assert len({each.digest() for each in (images, *others)}) == 7
    splits = Splits(images, None, others[0])
    assert splits.digests() == {"training": images.digest(), "test": others[0].digest()}
