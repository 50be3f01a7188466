"""Finds the images of a folder with one folder a class, and counts the other files."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ray_dmml.data.decoding import printable
from ray_dmml.data.findings import Findings
from ray_dmml.data.formats import package_for, suffixes
from ray_dmml.data.image_files import SYSTEM_FOLDERS, suffix, walk

_MOST_SUFFIXES = 10  # that a note names


def find_images(root: Path, findings: Findings) -> dict[str, list[str]]:
    """Paths of the images of ROOT/CLASS/**/IMAGE by class, relative to the root. Classes and paths are in name order.

    Hidden files and folders (.name) are left out. So are files that are not images by their suffix, the folders of
    :data:`SYSTEM_FOLDERS` and links to folders inside of a class, which one note counts.

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
        self._not_read: list[str] = []
        self._links: list[str] = []  # to folders
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
        self._outside = [name for name in entries if suffix(name) in suffixes() and not os.path.isdir(root / name)]
        around = os.path.realpath(root)
        classes: dict[str, str] = {}  # by name in one Unicode form
        for name in (name for name in entries if os.path.isdir(root / name)):
            target, form = os.path.realpath(root / name), unicodedata.normalize("NFC", name)
            if name.lower() in SYSTEM_FOLDERS:
                self._count_files_in(root / name)
            elif os.path.islink(root / name) and os.path.commonpath([target, around]) == target:
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
        """Paths in order; it is a fault if there are none."""
        paths: list[str] = []
        others: list[str] = []
        links: list[str] = []
        errors: list[OSError] = []
        for kind, inside in walk(self._root / name, errors.append):
            path = f"{name}/{inside.as_posix()}"
            if kind == "system folder":
                self._count_files_in(self._root / path)
            else:
                (paths if kind == "image" else others if kind == "other file" else links).append(path)
        for error in errors:
            self._report(error)
        if not paths and not errors:
            left_out = " and ".join(filter(None, (_counted(others), _counted_links(links))))
            has = f"; it has {left_out}" if left_out else ""
            path = printable(str(self._root / name))
            self._findings.fault(f"class folder {path} has no images in a known format{has}: fill or remove it")
        self._not_read += others
        self._links += links
        return sorted(paths)

    def note_what_is_not_used(self) -> None:
        parts = []
        if self._not_read:
            parts.append(f"{_counted(self._not_read)}, such as {printable(min(self._not_read))}")
        if links := _counted_links(self._links):
            parts.append(links)
        if self._outside:
            parts.append(f"{len(self._outside)} images in no class folder, such as {printable(self._outside[0])}")
        if self._in_system_folders:
            counts = sorted(self._in_system_folders.items())
            folders = ", ".join(f"{count} in {printable(name)}" for name, count in counts)
            parts.append(f"{folders} (folders that a NAS or an operating system makes)")
        if parts:
            self._findings.note(f"files of {printable(str(self._root))} that are not used: {'; '.join(parts)}")

    def _count_files_in(self, system_folder: Path) -> None:
        self._in_system_folders[system_folder.name] += sum(len(files) for _, _, files in os.walk(system_folder))

    def _report(self, error: OSError) -> None:
        self._findings.fault(f"folder {printable(str(error.filename))} cannot be read: {error.strerror}")


def _counted_links(links: list[str]) -> str:
    return f"{len(links)} links to folders, such as {printable(min(links))}" if links else ""


def _counted(files: Iterable[str]) -> str:
    """``12 .heic (pip install pillow-heif), 3 .txt, 1 without a suffix``"""
    counts = Counter(map(suffix, files)).most_common()
    parts = []
    for ending, count in counts[:_MOST_SUFFIXES]:
        package = package_for(ending)
        parts.append(
            f"{count} {printable(ending) or 'without a suffix'}"
            + (f" (to use them: pip install {package})" if package else "")
        )
    if rest := sum(count for _, count in counts[_MOST_SUFFIXES:]):
        parts.append(f"{rest} with other suffixes")
    return ", ".join(parts)
