"""A CSV file that lists images, classes and the retrieval protocol, as in open-metric-learning.

Its columns are ``path``, ``label``, ``split`` (``train``, or ``validation`` for the test classes)
and, for query against gallery, ``is_query`` and ``is_gallery``. Other columns are ignored.
https://open-metric-learning.readthedocs.io/en/latest/oml/data.html
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.decoding import Resize, printable
from ray_dmml.errors import UserError

# pandas writes 1.0 and 0.0 in a column of 0 and 1 that has gaps.
FLAGS = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

MAX_LINE = 2**20
"""The most characters of a line."""


@dataclass(frozen=True)
class _Row:
    path: str
    label: str
    split: str
    is_query: bool
    is_gallery: bool


def load(manifest: Path, root: Path, decode_size: int, resize: Resize) -> tuple[ImageSet, ImageSet]:
    """Train and test images of a manifest, whose paths are relative to ``root`` or inside it.

    Rows with flags are evaluated as queries against gallery. Without flags it is all against all.
    The flags of training rows apply if their class is held out for validation.

    Raises:
        UserError: the manifest is wrong; the message names the file and the line.
    """
    rows = _read(manifest, root)
    train = [row for row in rows if row.split == "train"]
    test = [row for row in rows if row.split == "validation"]
    for split, chosen in (("train", train), ("validation", test)):
        if not chosen:
            raise UserError(f"manifest {manifest} has no rows of split '{split}'")
    both = sorted({row.label for row in train} & {row.label for row in test})
    if both:
        raise UserError(
            f"manifest {manifest}: label {_cut(both[0])!r} is in both splits ({len(both)} such labels); "
            "classes must be in one of train and validation"
        )
    missing = [row.path for row in rows if not os.path.isfile(os.path.join(root, row.path))]
    if missing:
        raise UserError(
            f"manifest {manifest} lists {_cut(missing[0])}, which is not in {root} ({len(missing)} files are missing)"
        )
    return (
        _image_set(train, root, decode_size, resize),
        _image_set(test, root, decode_size, resize),
    )


def _image_set(rows: list[_Row], root: Path, decode_size: int, resize: Resize) -> ImageSet:
    names = sorted({row.label for row in rows})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    number = {name: label for label, name in enumerate(names)}
    query = np.flatnonzero([row.is_query for row in rows])
    gallery = np.flatnonzero([row.is_gallery for row in rows])
    has_protocol = bool(len(query) or len(gallery))
    return ImageSet(
        FileImages(root, [row.path for row in rows], decode_size, resize),
        np.array([number[row.label] for row in rows], dtype=np.int64),
        tuple(names),
        query if has_protocol else None,
        gallery if has_protocol else None,
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
            for column in ("path", "label", "split"):
                if column not in names:
                    raise UserError(
                        f"manifest {manifest} has no column '{column}'; its first line must name "
                        "path, label, split and, if wanted, is_query and is_gallery"
                    )
            rows: dict[str, _Row] = {}
            for cells in reader:
                where = f"manifest {manifest}, line {reader.line_num}"
                row = _parse(cells, root, base, where)
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
    text = printable(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parse(cells: dict[str, str | None], root: Path, base: str, where: str) -> _Row:
    def cell(column: str) -> str:
        return (cells.get(column) or "").strip()

    def flag(column: str) -> bool:
        text = cell(column)
        if text.lower() not in FLAGS:
            raise UserError(f"{where}: {column} is {_cut(text)!r}; allowed: 0, 1, True, False or empty")
        return FLAGS[text.lower()]

    for column in ("path", "label"):
        if not cell(column):
            raise UserError(f"{where}: {column} is empty")
    split = cell("split")
    if split not in ("train", "validation"):
        raise UserError(f"{where}: split is {_cut(split)!r}; allowed: train, validation")
    for column in ("path", "label"):
        if "\0" in cell(column):
            raise UserError(f"{where}: {column} has a character 0: this is not a text file")
    path = os.path.normpath(os.path.join(base, cell("path")))
    inside = os.path.join(base, "")
    if not path.startswith(inside):
        raise UserError(f"{where}: {_cut(cell('path'))} is outside data.root {root}")
    return _Row(
        Path(path[len(inside) :]).as_posix(),
        cell("label"),
        split,
        flag("is_query"),
        flag("is_gallery"),
    )
