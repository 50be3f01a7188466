"""The image files of a folder, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NoReturn

from ray_dmml.data.datasets.class_folders import SYSTEM_FOLDERS
from ray_dmml.data.decoding import printable
from ray_dmml.data.formats import suffixes
from ray_dmml.errors import UserError


def list_images(folder: Path | str) -> list[Path]:
    """The image files in a folder and its subfolders, in the order of their paths.

    Files are images by their suffix. Hidden files and folders, and folders that a NAS or an operating system makes, are
    left out; links to folders are not followed.

    Raises:
        UserError: there is no image, or a folder cannot be read.
    """
    top = Path(folder)
    files: list[Path] = []
    readable = suffixes()
    for inside, subfolders, names in os.walk(top, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if name[0] != "." and name.lower() not in SYSTEM_FOLDERS]
        files += [Path(inside, name) for name in names if name[0] != "." and PurePath(name).suffix.lower() in readable]
    if not files:
        raise UserError(f"folder {printable(str(top))} has no images")
    return sorted(files, key=Path.as_posix)


def files_of(images: Path | str | Iterable[Path | str]) -> list[Path]:
    """The files that are meant by a folder, a file, or several files. Only the order of a folder's files is ours.

    Raises:
        UserError: a folder has no images, or is one of several files.
    """
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        return list_images(path) if path.is_dir() else [path]
    files = [Path(path) for path in images]
    if folder := next((path for path in files if path.is_dir()), None):
        raise UserError(f"{printable(str(folder))} is a folder: give it alone, or list_images(folder) for its files")
    return files


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"folder {printable(str(error.filename))} cannot be read: {error.strerror}") from None
