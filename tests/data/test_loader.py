"""Batches of decoded images do not depend on the order of the steps."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import tiny
from fragile_images import with_unreadable

from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import BadImageError, ImageSet
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import DecodedBatches, in_chunks
from ray_dmml.data.sampler import ClassBalancedSampler


@pytest.fixture(scope="module")
def images(image_folder: Path) -> ImageSet:
    return load_splits(Config.parse(tiny(image_folder)).data).train


def test_batches_are_a_function_of_the_step(images: ImageSet) -> None:
    """In any order, twice, after a jump or from a new loader, the batch of a step has the images
    and labels of the sampler's indices."""
    sampler = ClassBalancedSampler(images.labels, 4, 3, seed=5)
    with closing(DecodedBatches(images, sampler, threads=2)) as loader:
        for step in (0, 1, 2, 9, 1, 1, 0, 7, 8):
            batch = loader.batch(step)
            indices = sampler.batch(step)
            assert batch.step == step
            assert batch.images.shape == (12, 3, 36, 36) and batch.images.dtype == torch.uint8
            assert batch.labels.dtype == torch.int64
            assert batch.labels.tolist() == images.labels[indices].tolist()
            for image, index in zip(batch.images, indices, strict=True):
                assert torch.equal(image, images.source.read(int(index)))


def test_an_unreadable_image_of_the_next_batch_waits_for_its_step(images: ImageSet) -> None:
    """Decoding ahead meets a broken file one step early. The error is raised at the file's own step."""
    sampler = ClassBalancedSampler(images.labels, 2, 2, seed=0)
    later = set(sampler.batch(1).tolist()) - set(sampler.batch(0).tolist())
    broken = sorted(later)[0]
    fragile = with_unreadable(images, broken)
    with closing(DecodedBatches(fragile, sampler)) as loader:
        assert len(loader.batch(0).images) == 4
        with pytest.raises(BadImageError, match=images.source.name(broken)):
            loader.batch(1)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_chunks_are_all_images_in_order(images: ImageSet, size: int) -> None:
    """Together the chunks have every image once, in order, and none is larger than ``size``."""
    chunks = list(in_chunks(images, size))
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert 1 <= len(chunks[-1]) <= size
    expected = torch.stack([images.source.read(i) for i in range(len(images))])
    assert torch.equal(torch.cat(chunks), expected)
