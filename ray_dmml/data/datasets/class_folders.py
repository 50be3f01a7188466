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
    not_read: list[str] = []
    in_system_folders: Counter[str] = Counter()
    images: dict[str, list[str]] = {}
    for name in _class_folders(root, findings, in_system_folders):
        others: list[str] = []
        faults: list[OSError] = []
        images[name] = _images_under(root, name, others, in_system_folders, faults)
        for error in faults:
            _report(error, findings)
        if not images[name]:
            del images[name]
            if not faults:
                has = f"; it has {_counted(others)}" if others else ""
                path = printable(str(root / name))
                findings.fault(f"class folder {path} has no images in a known format{has}: fill or remove it")
        not_read += others
    outside = [name for name in os.listdir(root) if name[0] != "." and _suffix(name) in suffixes()] if images else []
    _note(root, not_read, outside, in_system_folders, findings)
    return images


def _class_folders(root: Path, findings: Findings, in_system_folders: Counter[str]) -> list[str]:
    """Names in order. A class may be a link to a folder elsewhere, but not to one around it."""
    try:
        names = sorted(name for name in os.listdir(root) if name[0] != "." and (root / name).is_dir())
    except OSError as error:
        _report(error, findings)
        return []
    around = os.path.realpath(root)
    classes: dict[str, str] = {}  # by name in one Unicode form
    for name in names:
        form = unicodedata.normalize("NFC", name)
        target = os.path.realpath(root / name)
        if name.lower() in SYSTEM_FOLDERS:
            in_system_folders[name] += _num_files(root / name)
        elif os.path.islink(root / name) and os.path.commonpath([target, around]) == target:
            findings.fault(
                f"class folder {printable(str(root / name))} is a link to {printable(target)}, "
                "which holds the other classes too: remove it"
            )
        elif form in classes:
            findings.fault(
                f"{printable(str(root))} has two class folders {printable(form)!r}, whose names differ only in their "
                "Unicode form: merge them or rename one"
            )
        else:
            classes[form] = name
    return list(classes.values())


def _images_under(
    root: Path, name: str, others: list[str], in_system_folders: Counter[str], faults: list[OSError]
) -> list[str]:
    """Paths in order. Links to files are followed. Links to folders are not: they may form a circle.

    Files that are not images are appended to ``others``, and folders that cannot be read to ``faults``.
    """
    paths: list[str] = []
    readable = suffixes()
    for folder, subfolders, files in os.walk(root / name, onerror=faults.append):
        for system in (subfolder for subfolder in subfolders if subfolder.lower() in SYSTEM_FOLDERS):
            in_system_folders[system] += _num_files(Path(folder, system))
        subfolders[:] = [each for each in subfolders if each[0] != "." and each.lower() not in SYSTEM_FOLDERS]
        inside = Path(folder).relative_to(root)
        for file in files:
            if file[0] != ".":
                (paths if _suffix(file) in readable else others).append((inside / file).as_posix())
    return sorted(paths)


def _num_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _suffix(file: str) -> str:
    return PurePosixPath(file).suffix.lower()


def _note(
    root: Path, not_read: list[str], outside: list[str], in_system_folders: Counter[str], findings: Findings
) -> None:
    parts = []
    if not_read:
        parts.append(f"{_counted(not_read)}, such as {printable(min(not_read))}")
    if outside:
        parts.append(f"{len(outside)} images in no class folder, such as {printable(min(outside))}")
    if in_system_folders:
        folders = ", ".join(f"{count} in {printable(name)}" for name, count in sorted(in_system_folders.items()))
        parts.append(f"{folders} (folders that a NAS or an operating system makes)")
    if parts:
        findings.note(f"files of {printable(str(root))} that are not used: {'; '.join(parts)}")


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


def _report(error: OSError, findings: Findings) -> None:
    findings.fault(f"folder {printable(str(error.filename))} cannot be read: {error.strerror}")
