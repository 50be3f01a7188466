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

    They come in the order of their paths, byte by byte, and no more than the names in one folder and in those above it
    are in memory. Files are images by their suffix. Links to files are followed. Links to folders are not, because they
    may form a circle. Of hidden files and folders (.name) there is nothing.
    """
    readable, above = suffixes(), [iter(_entries(top, "", onerror))]
    while above:
        path, is_folder, is_link = next(above[-1], ("", False, False))
        if not path:
            above.pop()
        elif not is_folder:
            yield "image" if suffix(path) in readable else "other file", Path(path)
        elif os.path.basename(path).lower() in SYSTEM_FOLDERS:
            yield "system folder", Path(path)
        elif is_link:
            yield "link to a folder", Path(path)
        else:
            above.append(iter(_entries(top, path, onerror)))


def _entries(top: Path, inside: str, onerror: Callable[[OSError], object]) -> list[tuple[str, bool, bool]]:
    """(path relative to the top, is a folder, is a link) of all entries of a folder that are not hidden."""
    try:
        with os.scandir(top / inside) as found:
            entries = [
                (os.path.join(inside, entry.name), _is_folder(entry), entry.is_symlink())
                for entry in found
                if entry.name[0] != "."
            ]
    except OSError as error:
        onerror(error)
        return []
    # All paths in folder "a" are behind "a-b" and before "a0", as "a/" is.
    return sorted(entries, key=lambda entry: os.fsencode(entry[0]) + b"/" * entry[1])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


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
    files = [top / path for path in iterate_images(top)]
    if not files:
        raise UserError(f"folder {printable(str(top))} has no images")
    return files


def iterate_images(folder: Path | str) -> Iterator[Path]:
    """The same one by one, relative to the folder. If there is none, there is no error."""
    return (path for kind, path in walk(Path(folder), _refuse) if kind == "image")


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
