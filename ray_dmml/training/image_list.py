"""images.csv.gz: the images of a run with their sizes, classes and splits. A run resumes with the same ones only."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ray_dmml.atomic_files import replace_file
from ray_dmml.data.dataset import FileImages, ImageSet, Splits
from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError

logger = logging.getLogger(__name__)

HEADER = ["name", "bytes", "label", "split", "role"]
CHUNK, NUM_THREADS = 256, 16  # a network file system answers many questions at a time
MAX_BYTES = 512 * 2**20  # of the unpacked list of a run, which may be somebody else's; some millions of images
SHOWN = 3  # names in a message, of each kind of difference


class Row(NamedTuple):
    """An image: its name (a path relative to ``data.root``), the size of its file ("" if it is no file), the name of
    its class, ``training``, ``validation`` or ``test``, and ``query``, ``gallery`` or both where a split is parted."""

    name: str
    size: str
    label: str
    split: str
    role: str = ""


class ImageList:
    """The images of all splits, in their order."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    @classmethod
    def of(cls, splits: Splits) -> ImageList:
        """Asks the file system for the size of each image; no file is read."""
        return cls(row for split, images in splits.parts().items() for row in _rows(split, images))

    @classmethod
    def read(cls, path: Path) -> ImageList | None:
        """The list in a file; None if there is no such file, or, with a warning, if it cannot be read."""
        try:
            with gzip.open(path) as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
            header, *rows = csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""))
            if header != HEADER:
                raise ValueError(f"its first line is not {','.join(HEADER)}")
            return cls(map(Row._make, rows))
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, TypeError, zlib.error, csv.Error) as error:
            logger.warning("%s cannot be read, so the images are not compared with it: %s", path, error)
            return None

    def write(self, path: Path) -> None:
        """Raises CheckpointError if the file cannot be written."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows([HEADER, *self.rows])
        replace_file(path, gzip.compress(text.getvalue().encode("utf-8", "surrogateescape"), 6, mtime=0))

    def only(self, *splits: str) -> ImageList:
        """The images of these splits."""
        return ImageList(row for row in self.rows if row.split in splits)

    def differences(self, now: ImageList) -> str:
        """What became of these images, in one sentence; "" if nothing has changed."""
        before, after = ({row.name: row for row in each.rows} for each in (self, now))
        both = before.keys() & after.keys()
        kinds = {
            "missing or unreadable": before.keys() - both,
            "new": after.keys() - both,
            "of another size": {name for name in both if before[name].size != after[name].size},
            "of another class": {name for name in both if before[name].label != after[name].label},
            "in another split": {name for name in both if before[name].split != after[name].split},
            "with another is_query or is_gallery": {name for name in both if before[name].role != after[name].role},
        }
        found = [f"{len(names)} {kind} ({some_names(names)})" for kind, names in kinds.items() if names]
        if not found and self.rows != now.rows:
            found = ["they are in another order"]
        return ", ".join(found)

    def training_set(self) -> ImageSet:
        """Names and classes of the images that were trained on. They cannot be read."""
        rows = self.only("training").rows
        names, labels = np.unique([row.label for row in rows], return_inverse=True)
        files = FileImages(Path(), [row.name for row in rows], 1)
        return ImageSet(files, labels.astype(np.int64), tuple(names.tolist()))


def require_same_images(path: Path, splits: Splits, run: Path) -> None:
    """Raises UserError if the images are not those in the list at ``path``, which a resumed run began with."""
    before = ImageList.read(path)
    changes = before.differences(ImageList.of(splits)) if before is not None else ""
    if changes:
        raise UserError(
            f"{run} cannot be resumed, because its images have changed: {changes}. A run goes on with the images that "
            f"it began with; a new run with train.init_from={run} starts from its weights"
        )


def _rows(split: str, images: ImageSet) -> list[Row]:
    source = images.source
    num_bytes: Callable[[int], int | None] = getattr(source, "num_bytes", lambda index: None)

    def sizes(start: int) -> list[int | None]:
        return [num_bytes(index) for index in range(start, min(start + CHUNK, len(images)))]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        all_sizes = [size for chunk in pool.map(sizes, range(0, len(images), CHUNK)) for size in chunk]
    roles = _roles(images)
    return [
        Row(source.name(index), "" if size is None else str(size), images.class_names[label], split, roles[index])
        for index, (size, label) in enumerate(zip(all_sizes, images.labels.tolist(), strict=True))
    ]


def _roles(images: ImageSet) -> list[str]:
    query, gallery = (set(() if part is None else part.tolist()) for part in (images.query, images.gallery))
    return [" ".join(["query"] * (i in query) + ["gallery"] * (i in gallery)) for i in range(len(images))]


def some_names(names: Iterable[str]) -> str:
    """The first names in order, for a message."""
    ordered = sorted(names)
    return ", ".join(map(printable, ordered[:SHOWN])) + (", ..." if len(ordered) > SHOWN else "")
