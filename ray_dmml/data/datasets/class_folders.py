"""Finds the images of a folder with one folder a class, and counts the other files."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ray_dmml.data.decoding import printable
from ray_dmml.data.findings import Findings
from ray_dmml.data.formats import package_for, suffixes

SYSTEM_FOLDERS = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "__macosx"),
        *("$recycle.bin", "system volume information", "lost+found"),
    }
)
"""Names, in lower case, of folders that a NAS, macOS or Windows makes beside the photos: for thumbnails, deleted files
and copies."""

_MOST_SUFFIXES = 10  # that a note names


def find_images(root: Path, findings: Findings) -> dict[str, list[str]]:
    """Paths of the images of ROOT/CLASS/**/IMAGE by class, relative to the root. Classes and paths are in name order.

    Hidden files and folders (.name) are left out. So are the folders of :data:`SYSTEM_FOLDERS` and files that are not
    images by their suffix, which one note counts.

    Args:
        root: the folder of the class folders.
        findings: gets a note of what is left out, and a fault for each folder that cannot be read, has no images, links
            to a folder around it, or has the name of another one in another Unicode form.
    """
    scan = _Scan(root, findings)
    images = {}
    for name in scan.class_folders():
        paths = scan.images_under(name)
        if paths:
            images[name] = paths
    scan.note_what_is_not_used()
    return images


class _Scan:
    """One walk through the class folders of a root, which counts the files that are not images."""

    def __init__(self, root: Path, findings: Findings) -> None:
        self._root, self._findings = root, findings
        self._readable = suffixes()
        self._not_read: list[str] = []
        self._outside: list[str] = []  # images that lie in no class folder
        self._in_system_folders: Counter[str] = Counter()

    def class_folders(self) -> list[str]:
        """Names in order. A class may be a link to a folder elsewhere, but not to one around it."""
        root, findings = self._root, self._findings
        try:
            entries = sorted(name for name in os.listdir(root) if name[0] != ".")
        except OSError as error:
            self._report(error)
            return []
        self._outside = [name for name in entries if _suffix(name) in self._readable and not os.path.isdir(root / name)]
        around = os.path.realpath(root)
        classes: dict[str, str] = {}  # by name in one Unicode form
        for name in (name for name in entries if os.path.isdir(root / name)):
            target, form = os.path.realpath(root / name), unicodedata.normalize("NFC", name)
            if self._is_of_the_system(name, root):
                continue
            if os.path.islink(root / name) and os.path.commonpath([target, around]) == target:
                findings.fault(
                    f"class folder {printable(str(root / name))} is a link to {printable(target)}, "
                    "which holds the other classes too: remove it"
                )
            elif form in classes:
                findings.fault(
                    f"{printable(str(root))} has two class folders {printable(form)!r}, whose names differ only in "
                    "their Unicode form: merge them or rename one"
                )
            else:
                classes[form] = name
        return list(classes.values())

    def images_under(self, name: str) -> list[str]:
        """Paths in order; it is a fault if there are none. Links to files are followed. Links to folders are not: they
        may form a circle."""
        paths: list[str] = []
        others: list[str] = []
        errors: list[OSError] = []
        for folder, subfolders, files in os.walk(self._root / name, onerror=errors.append):
            subfolders[:] = [each for each in subfolders if each[0] != "." and not self._is_of_the_system(each, folder)]
            inside = Path(folder).relative_to(self._root)
            for file in files:
                if file[0] != ".":
                    (paths if _suffix(file) in self._readable else others).append((inside / file).as_posix())
        for error in errors:
            self._report(error)
        if not paths and not errors:
            has = f"; it has {_counted(others)}" if others else ""
            path = printable(str(self._root / name))
            self._findings.fault(f"class folder {path} has no images in a known format{has}: fill or remove it")
        self._not_read += others
        return sorted(paths)

    def note_what_is_not_used(self) -> None:
        parts = []
        if self._not_read:
            parts.append(f"{_counted(self._not_read)}, such as {printable(min(self._not_read))}")
        if self._outside:
            parts.append(f"{len(self._outside)} images in no class folder, such as {printable(self._outside[0])}")
        if self._in_system_folders:
            counts = sorted(self._in_system_folders.items())
            folders = ", ".join(f"{count} in {printable(name)}" for name, count in counts)
            parts.append(f"{folders} (folders that a NAS or an operating system makes)")
        if parts:
            self._findings.note(f"files of {printable(str(self._root))} that are not used: {'; '.join(parts)}")

    def _is_of_the_system(self, name: str, folder: Path | str) -> bool:
        """Whether it is a folder of :data:`SYSTEM_FOLDERS`, whose files are then counted."""
        is_one = name.lower() in SYSTEM_FOLDERS
        if is_one:
            self._in_system_folders[name] += sum(len(files) for _, _, files in os.walk(Path(folder, name)))
        return is_one

    def _report(self, error: OSError) -> None:
        self._findings.fault(f"folder {printable(str(error.filename))} cannot be read: {error.strerror}")


def _suffix(file: str) -> str:
    return PurePosixPath(file).suffix.lower()


def _counted(files: Iterable[str]) -> str:
    """``12 .heic (pip install pillow-heif), 3 .txt, 1 without a suffix``"""
    counts = Counter(map(_suffix, files)).most_common()
    parts = []
    for suffix, count in counts[:_MOST_SUFFIXES]:
        package = package_for(suffix)
        parts.append(
            f"{count} {printable(suffix) or 'without a suffix'}"
            + (f" (to use them: pip install {package})" if package else "")
        )
    if rest := sum(count for _, count in counts[_MOST_SUFFIXES:]):
        parts.append(f"{rest} with other suffixes")
    return ", ".join(parts)
