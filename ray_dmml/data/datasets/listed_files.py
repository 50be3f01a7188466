"""Finds the files that a list names: through links of the root, and in another Unicode form."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


class ListedFiles:
    """The files under a root, by the paths of a list.

    Args:
        root: the folder that paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._target = os.path.abspath(root), os.path.realpath(root)
        self._targets: dict[str, str] = {}  # of links, by folder
        self._names: dict[str, dict[str, str]] = {}  # by folder: the name of each entry by its NFC form

    def relative(self, path: str) -> str | None:
        """The path relative to the root, with slashes. None: it is outside.

        An absolute path may lead to the root through links. A link inside the root may lead out of it.
        """
        path = os.path.normpath(os.path.join(self._root, path))
        inside = os.path.join(self._root, "")
        if path.startswith(inside):
            return Path(path.removeprefix(inside)).as_posix()
        for folder in reversed(Path(path).parents):
            target = self._target_of(str(folder))
            if os.path.join(target, "").startswith(os.path.join(self._target, "")):
                return Path(os.path.relpath(target, self._target), Path(path).relative_to(folder)).as_posix()
        return None

    def find(self, path: str) -> str | None:
        """The path of an existing file; None: there is none.

        Args:
            path: relative to the root. The file's name on disk may be written in another Unicode form: é is one
                character or two.
        """
        if os.path.isfile(os.path.join(self._root, path)):
            return path
        if path.isascii():
            return None
        found = ""
        for part in path.split("/"):
            if not os.path.lexists(os.path.join(self._root, found, part)):
                part = self._names_in(found).get(unicodedata.normalize("NFC", part), part)
            found = os.path.join(found, part)
        return found if os.path.isfile(os.path.join(self._root, found)) else None

    def _target_of(self, folder: str) -> str:
        if folder not in self._targets:
            self._targets[folder] = os.path.realpath(folder)
        return self._targets[folder]

    def _names_in(self, folder: str) -> dict[str, str]:
        if folder not in self._names:
            try:
                names = sorted(os.listdir(os.path.join(self._root, folder)))
            except (OSError, ValueError):
                names = []
            self._names[folder] = {unicodedata.normalize("NFC", name): name for name in names}
        return self._names[folder]
