"""A CSV file that lists images, classes and the retrieval protocol, as in open-metric-learning.

Its columns are ``path``, ``label``, ``split`` (``train``, or ``validation`` for the test classes), for query against
gallery ``is_query`` and ``is_gallery``, and for a part of an image ``x_1``, ``x_2``, ``y_1`` and ``y_2``. Without the
column ``split`` all rows train. Results are also given by ``category``. Images with the same ``sequence`` (or the same
value in the column that ``data.exclude_same`` names) are not matched with each other. A note names all other columns.
https://open-metric-learning.readthedocs.io/en/latest/oml/data.html
"""

from __future__ import annotations

import csv
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from ray_dmml.config.loading import shorten
from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.datasets.listed_files import ListedFiles
from ray_dmml.data.decoding import Box, printable
from ray_dmml.data.findings import Findings
from ray_dmml.errors import UserError

# pandas writes 1.0 and 0.0 in a column of 0 and 1 that has gaps.
FLAGS = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

FLAG_COLUMNS = ("is_query", "is_gallery")
BOX_COLUMNS = ("x_1", "x_2", "y_1", "y_2")
COLUMNS = ("path", "label", "split", *FLAG_COLUMNS, *BOX_COLUMNS)
CATEGORY, SEQUENCE = "category", "sequence"

# Columns by their names in lower case without underscores, and two frequent slips.
_MEANT = {column.replace("_", ""): column for column in COLUMNS} | {"splits": "split", "spilt": "split"}

MAX_LINE = 2**20  # characters
SHOWN = 10  # columns that a note names


class _Row(NamedTuple):
    path: str
    label: str
    split: str
    is_query: bool
    is_gallery: bool
    box: Box | None
    category: str
    sequence: str
    """The cell of the column that ``data.exclude_same`` names."""


def load(config: DataConfig, root: Path, findings: Findings) -> tuple[ImageSet | None, ImageSet | None]:
    """Train and test images of a manifest, whose paths are relative to ``root`` or inside it; None for a split without
    rows.

    Rows with flags are evaluated as queries against gallery. Without flags it is all against all. The flags of training
    rows apply if their class is held out for validation.

    Raises:
        UserError: the manifest is wrong; the message names the file and the line.
    """
    manifest = config.manifest or Path()
    rows = _read(manifest, root, config.exclude_same, findings)
    train, test = ([row for row in rows if row.split == split] for split in ("train", "validation"))
    both = sorted({row.label for row in train} & {row.label for row in test})
    if both and config.split_by == "class":
        findings.fault(
            f"manifest {manifest}: label {_cut(both[0])!r} is in both splits ({len(both)} such labels); "
            "classes must be in one of train and validation, unless data.split_by is image"
        )
    train_set, test_set = (_image_set(split, root, config) if split else None for split in (train, test))
    return train_set, test_set


def _image_set(rows: list[_Row], root: Path, config: DataConfig) -> ImageSet:
    names = sorted({row.label for row in rows})
    if all(name.isascii() and name.isdecimal() for name in names):
        names.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))  # as numbers, of any length
    number = {name: label for label, name in enumerate(names)}
    query = np.flatnonzero([row.is_query for row in rows])
    gallery = np.flatnonzero([row.is_gallery for row in rows])
    has_flags = len(query) > 0 or len(gallery) > 0
    return ImageSet(
        FileImages(
            root, [row.path for row in rows], config.decode_size, config.resize, boxes=[row.box for row in rows]
        ),
        np.array([number[row.label] for row in rows], dtype=np.int64),
        tuple(names),
        query if has_flags else None,
        gallery if has_flags else None,
        _numbers([row.sequence for row in rows]),
        tuple(row.category for row in rows) if any(row.category for row in rows) else None,
    )


def _numbers(values: Sequence[str]) -> np.ndarray | None:
    """(N,) int64: equal for images with the same value, and a number of its own for an image without one. None: no
    image has a value."""
    if not any(values):
        return None
    known: dict[str | int, int] = {}
    return np.array([known.setdefault(value or index, len(known)) for index, value in enumerate(values)], np.int64)


def _read(manifest: Path, root: Path, exclude_same: str | None, findings: Findings) -> list[_Row]:
    """The rows whose files exist."""
    try:
        if manifest.exists() and not manifest.is_file():
            raise UserError(f"data.manifest {manifest} is not a file")
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(lines_of(file))
            reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
            if not _has_columns(manifest, names, exclude_same, findings):
                return []
            return _read_rows(reader, f"manifest {manifest}", root, exclude_same, findings)
    except OSError as error:
        raise UserError(f"data.manifest {manifest} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.manifest {manifest} is not a CSV file in UTF-8: {error}") from None


def _has_columns(manifest: Path, names: Sequence[str], exclude_same: str | None, findings: Findings) -> bool:
    """Whether the rows can be read; if not, there is a fault."""
    before = len(findings.faults)
    like = {_MEANT.get(name.lower().replace("_", "")): name for name in names}
    for column in dict.fromkeys((*COLUMNS, CATEGORY, exclude_same or CATEGORY)):
        if names.count(column) > 1:
            findings.fault(f"manifest {manifest} has two columns '{column}'")
        is_needed = column in ("path", "label") or (column in BOX_COLUMNS and not set(BOX_COLUMNS).isdisjoint(names))
        if column not in names and column in like:  # without a fault, all rows would train, or all images be whole
            findings.fault(f"manifest {manifest} has no column '{column}' but one like it, {_cut(like[column])!r}")
        elif is_needed and column not in names:
            findings.fault(
                f"manifest {manifest} has no column '{column}'; its first line must name path, label and, if "
                "wanted, split, is_query and is_gallery, and the box of an image (x_1, x_2, y_1, y_2)"
            )
    if exclude_same not in (None, SEQUENCE, *names):
        findings.fault(f"manifest {manifest} has no column {_cut(str(exclude_same))!r}, which data.exclude_same names")
    unused = [_cut(name) for name in names if name and name not in (*COLUMNS, CATEGORY, exclude_same)]
    if unused:
        more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
        findings.note(f"columns of manifest {manifest} that are not used: {', '.join(unused[:SHOWN])}{more}")
    return len(findings.faults) == before


def _read_rows(
    reader: csv.DictReader[str], name: str, root: Path, exclude_same: str | None, findings: Findings
) -> list[_Row]:
    files = ListedFiles(root)
    rows: dict[tuple[str, Box | None], _Row] = {}
    missing: list[str] = []
    for cells in reader:
        where = f"{name}, line {reader.line_num}"
        if "split" not in (reader.fieldnames or ()):
            cells["split"] = "train"
        try:
            row = _parse(cells, files, root, exclude_same, where)
            path = files.find(row.path)
            if path is None:
                missing.append(row.path)
            elif (path, row.box) in rows:
                raise UserError(f"{where}: {_cut(path)} is listed a second time")
            else:
                rows[path, row.box] = row._replace(path=path)
        except UserError as error:
            findings.fault(str(error))
    if missing:
        findings.fault(f"{name} lists {_cut(missing[0])}, which is not in {root} ({len(missing)} files are missing)")
    return list(rows.values())


def lines_of(file: TextIO) -> Iterator[str]:
    """Lines of a file, which may not be a table but a single line without end."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise csv.Error(f"a line has more than {MAX_LINE} characters")
        yield line


def _cut(text: str) -> str:
    return shorten(printable(text))


def _parse(row: dict[str, str], files: ListedFiles, root: Path, exclude_same: str | None, where: str) -> _Row:
    if any(row.get(None) or ()):  # type: ignore[call-overload]  # cells beyond those of the header
        raise UserError(f"{where}: there are more cells than columns; quote a cell that has a comma in it")
    cells = {column: (row.get(column) or "").strip() for column in COLUMNS}
    for column in ("path", "label"):
        if not cells[column]:
            raise UserError(f"{where}: {column} is empty")
        if "\0" in cells[column]:
            raise UserError(f"{where}: {column} has a character 0: this is not a text file")
    if cells["split"] not in ("train", "validation"):
        raise UserError(f"{where}: split is {_cut(cells['split'])!r}; allowed: train, validation")
    for column in FLAG_COLUMNS:
        if cells[column].lower() not in FLAGS:
            raise UserError(f"{where}: {column} is {_cut(cells[column])!r}; allowed: 0, 1, True, False or empty")
    is_query, is_gallery = (FLAGS[cells[column].lower()] for column in FLAG_COLUMNS)
    path = files.relative(cells["path"])
    if path is None:
        raise UserError(f"{where}: {_cut(cells['path'])} is outside data.root {root}")
    # Nobody sees in which form an é is written.
    label, category, sequence = (
        unicodedata.normalize("NFC", ((column and row.get(column)) or "").strip())
        for column in ("label", CATEGORY, exclude_same)
    )
    return _Row(path, label, cells["split"], is_query, is_gallery, _parse_box(cells, where), category, sequence)


def _parse_box(cells: dict[str, str], where: str) -> Box | None:
    """The whole pixels that the box touches. None: the whole image."""
    texts = [cells[column] for column in BOX_COLUMNS]
    if not any(texts):
        return None
    try:
        x_1, x_2, y_1, y_2 = map(float, texts)
        if max(map(abs, (x_1, x_2, y_1, y_2))) < 2**31 and x_1 < x_2 and y_1 < y_2:
            return Box(math.floor(x_1), math.floor(y_1), math.ceil(x_2), math.ceil(y_2))
    except ValueError:
        pass
    box = ", ".join(f"{column} {_cut(text)!r}" for column, text in zip(BOX_COLUMNS, texts, strict=True))
    raise UserError(f"{where}: {box} is not a box: x_1 < x_2 and y_1 < y_2, in pixels; or all four are empty")
