"""A CSV file that lists images, classes and the retrieval protocol, as in open-metric-learning.

Its columns are ``path``, ``label``, ``split`` (``train``, or ``validation`` for the test classes) and, for query
against gallery, ``is_query`` and ``is_gallery``. Without the column ``split`` all rows train. Other columns are
ignored.
https://open-metric-learning.readthedocs.io/en/latest/oml/data.html
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from ray_dmml.config.loading import shorten
from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError

# pandas writes 1.0 and 0.0 in a column of 0 and 1 that has gaps.
FLAGS = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

MAX_LINE = 2**20  # characters


class _Row(NamedTuple):
    path: str
    label: str
    split: str
    is_query: bool
    is_gallery: bool


def load(config: DataConfig, root: Path) -> tuple[ImageSet | None, ImageSet | None]:
    """Train and test images of a manifest, whose paths are relative to ``root`` or inside it; None for a split without
    rows.

    Rows with flags are evaluated as queries against gallery. Without flags it is all against all. The flags of training
    rows apply if their class is held out for validation.

    Raises:
        UserError: the manifest is wrong; the message names the file and the line.
    """
    manifest = config.manifest or Path()
    rows = _read(manifest, root)
    train, test = ([row for row in rows if row.split == split] for split in ("train", "validation"))
    both = sorted({row.label for row in train} & {row.label for row in test})
    if both and config.split_by == "class":
        raise UserError(
            f"manifest {manifest}: label {_cut(both[0])!r} is in both splits ({len(both)} such labels); "
            "classes must be in one of train and validation, unless data.split_by is image"
        )
    missing = [row.path for row in rows if not os.path.isfile(os.path.join(root, row.path))]
    if missing:
        raise UserError(
            f"manifest {manifest} lists {_cut(missing[0])}, which is not in {root} ({len(missing)} files are missing)"
        )
    train_set, test_set = (_image_set(split, root, config) if split else None for split in (train, test))
    return train_set, test_set


def _image_set(rows: list[_Row], root: Path, config: DataConfig) -> ImageSet:
    names = sorted({row.label for row in rows})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    number = {name: label for label, name in enumerate(names)}
    query = np.flatnonzero([row.is_query for row in rows])
    gallery = np.flatnonzero([row.is_gallery for row in rows])
    return ImageSet(
        FileImages(root, [row.path for row in rows], config.decode_size, config.resize),
        np.array([number[row.label] for row in rows], dtype=np.int64),
        tuple(names),
        *((query, gallery) if len(query) or len(gallery) else ()),
    )


def _read(manifest: Path, root: Path) -> list[_Row]:
    base = os.path.abspath(root)
    try:
        if manifest.exists() and not manifest.is_file():
            raise UserError(f"data.manifest {manifest} is not a file")
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(_lines(file))
            names = reader.fieldnames or ()
            for column in ("path", "label", "split", "is_query", "is_gallery"):
                if names.count(column) > 1:
                    raise UserError(f"manifest {manifest} has two columns '{column}'")
                if column not in names and column in ("path", "label"):
                    raise UserError(
                        f"manifest {manifest} has no column '{column}'; its first line must name "
                        "path, label and, if wanted, split, is_query and is_gallery"
                    )
            if "split" not in names and (close := get_close_matches("split", [str(n).strip().lower() for n in names])):
                raise UserError(f"manifest {manifest} has no column 'split' but one like it, {_cut(close[0])!r}")
            rows: dict[str, _Row] = {}
            for cells in reader:
                where = f"manifest {manifest}, line {reader.line_num}"
                if "split" not in names:
                    cells["split"] = "train"
                row = _parse({key: (cells.get(key) or "").strip() for key in _Row._fields}, root, base, where)
                if row.path in rows:
                    raise UserError(f"{where}: {_cut(row.path)} is listed a second time")
                rows[row.path] = row
            return list(rows.values())
    except OSError as error:
        raise UserError(f"data.manifest {manifest} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.manifest {manifest} is not a CSV file in UTF-8: {error}") from None


def _lines(file: TextIO) -> Iterator[str]:
    """Lines of a file, which may not be a table but a single line without end."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise csv.Error(f"a line has more than {MAX_LINE} characters")
        yield line


def _cut(text: str) -> str:
    return shorten(printable(text))


def _parse(cells: dict[str, str], root: Path, base: str, where: str) -> _Row:
    for column in ("path", "label"):
        if not cells[column]:
            raise UserError(f"{where}: {column} is empty")
        if "\0" in cells[column]:
            raise UserError(f"{where}: {column} has a character 0: this is not a text file")
    if cells["split"] not in ("train", "validation"):
        raise UserError(f"{where}: split is {_cut(cells['split'])!r}; allowed: train, validation")
    flags = {column: FLAGS.get(cells[column].lower()) for column in ("is_query", "is_gallery")}
    for column, flag in flags.items():
        if flag is None:
            raise UserError(f"{where}: {column} is {_cut(cells[column])!r}; allowed: 0, 1, True, False or empty")
    path = os.path.normpath(os.path.join(base, cells["path"]))
    inside = os.path.join(base, "")
    if not path.startswith(inside):
        raise UserError(f"{where}: {_cut(cells['path'])} is outside data.root {root}")
    return _Row(Path(path.removeprefix(inside)).as_posix(), cells["label"], cells["split"], *map(bool, flags.values()))
