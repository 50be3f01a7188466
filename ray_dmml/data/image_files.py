"""The image files of a folder, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Literal, NoReturn

from ray_dmml.data.decoding import printable
from ray_dmml.data.formats import suffixes
from ray_dmml.errors import UserError

SYSTEM_FOLDERS = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "__macosx"),
        *("$recycle.bin", "system volume information", "lost+found"),
    }
)
"""Names, in lower case, of folders that a NAS, macOS or Windows makes beside the photos: for thumbnails, deleted files
and copies."""

Kind = Literal["image", "other file", "link to a folder", "system folder"]


def walk(top: Path, onerror: Callable[[OSError], object]) -> Iterator[tuple[Kind, Path]]:
    """The images in a folder and its subfolders and what is left out of them, as paths relative to it.

    Files are images by their suffix. Links to files are followed. Links to folders are not, because they may form a
    circle. Of hidden files and folders (.name) there is nothing.
    """
    readable = suffixes()
    for folder, subfolders, files in os.walk(top, onerror=onerror):
        inside = Path(folder).relative_to(top)
        for name in files:
            if name[0] != ".":
                yield "image" if suffix(name) in readable else "other file", inside / name
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for name in list(subfolders):
            if name.lower() in SYSTEM_FOLDERS:
                subfolders.remove(name)
                yield "system folder", inside / name
            elif os.path.islink(os.path.join(folder, name)):
                yield "link to a folder", inside / name


def suffix(name: str) -> str:
    """In lower case, with its dot."""
    return PurePath(name).suffix.lower()


def list_images(folder: Path | str) -> list[Path]:
    """The image files in a folder and its subfolders, in the order of their paths.

    Files are images by their suffix. Hidden files and folders, and folders that a NAS or an operating system makes, are
    left out; links to folders are not followed.

    Raises:
        UserError: there is no image, or a folder cannot be read.
    """
    top = Path(folder)
    files = [top / path for kind, path in walk(top, _refuse) if kind == "image"]
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
