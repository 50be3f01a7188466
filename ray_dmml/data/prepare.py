"""Everything that a machine's first run would do for its images before it reads them."""

from __future__ import annotations

from collections.abc import Callable

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.staging import fetch, local_root


def prepare(config: DataConfig, log: Callable[[str], None] = lambda line: None) -> str:
    """Copies or downloads the images of a data set, and reads its lists.

    A copy that is there is compared with what ``data.source`` has by now.

    Args:
        config: which.
        log: is told what takes the time.

    Returns:
        what there is now, in a sentence.

    Raises:
        UserError: as :func:`load_splits`.
    """
    if config.source is not None:
        fetch(config, log, again=True)
    splits = load_splits(config, log, check=False)
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    told = ", ".join(
        f"{len(images)} {name} images of {images.num_classes} classes"
        for name, images in parts.items()
        if images is not None
    )
    place = "built in" if config.name == "characters" else f"in {local_root(config)}"
    return f"{told}, {place}"
