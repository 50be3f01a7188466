"""The images of a benchmark, all of which must be there."""

from __future__ import annotations

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.datasets.benchmarks import BENCHMARKS
from ray_dmml.errors import UserError


def read_archive(data: DataConfig, *, check: bool) -> Splits:
    """The images of a data set.

    Args:
        data: the data set, and where it is.
        check: also decode every image, once, before a run does.

    Raises:
        UserError: the archive is missing or not all of it is there, with where to get it and where to put its files; or
            an image cannot be read.
    """
    try:
        splits = load_splits(data, check=check)
    except UserError:
        _require_files(load_splits(data, check=False), data)
        raise
    _require_files(splits, data)
    return splits


def _require_files(splits: Splits, data: DataConfig) -> None:
    sources = [part.source for part in splits.parts().values()]
    missing = [source.name(n) for source in sources for n in range(len(source)) if source.num_bytes(n) is None]
    if missing and data.on_bad_image == "fail":
        benchmark = BENCHMARKS[data.name]
        raise UserError(
            f"{benchmark.title} in {data.root} is incomplete, {len(missing)} of {sum(map(len, sources))} images are "
            f"missing, such as {missing[0]}: {benchmark.by_hand}"
        )


def counts_of(splits: Splits) -> list[int]:
    """Training images and classes, and test images and classes."""
    parts = [part for part in (splits.train, splits.test) if part is not None]
    return [number for part in parts for number in (len(part), part.num_classes)]
