"""The Python files of the setting `code`: read once, importable in this process, and sent to the peers' processes.

Every process of a run imports the same content, whatever happens to the files meanwhile and whatever its node has. They
are imported from memory, so that nothing is left on a node.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

from ray_dmml.errors import UserError

MAX_BYTES = 8 * 2**20

Files = Mapping[str, tuple[str, bytes]]
"""``parts.py`` or ``package/module.py`` to the path that it was read from, and its content."""


def read_code(paths: Sequence[Path]) -> Files:
    """Reads Python files, and packages with all Python files in them.

    Raises:
        UserError: a path is neither, its name cannot be imported, or they are too large together.
    """
    files: dict[str, tuple[str, bytes]] = {}
    size = 0
    for path in paths:
        is_file = path.suffix == ".py" and os.path.isfile(path)
        nothing = f"code: {path} is neither a Python file (NAME.py) nor a folder with some"
        if not (is_file or os.path.isdir(path)):
            raise UserError(nothing)
        name = path.stem if is_file else path.name
        if not name.isidentifier() or name in sys.stdlib_module_names:
            why = "a module of Python's own" if name in sys.stdlib_module_names else "not a name that can be imported"
            raise UserError(f"code: {path}: {name} is {why}; rename it")
        if any(file.partition("/")[0].removesuffix(".py") == name for file in files):
            raise UserError(f"code: {path}: another entry has the name {name}, too; rename one of them")
        found = [path] if is_file else sorted(path.rglob("*.py"))
        if not found:
            raise UserError(nothing)
        for file in found:
            try:
                size += file.stat().st_size
                if size > MAX_BYTES:
                    raise UserError(f"code: more than {MAX_BYTES // 2**20} MiB of Python files, up to {file}")
                files[file.relative_to(path.parent).as_posix()] = str(file), file.read_bytes()
            except OSError as error:
                raise UserError(f"code: {file} cannot be read: {error.strerror}") from None
    return files


def use_code(files: Files) -> None:
    """Makes the files importable in this process, and what an earlier call made importable no longer.

    Raises:
        UserError: the Python path has another module of the same name, which the files must not replace.
    """
    if files == _finder.files:
        return
    for file, (origin, _) in files.items():
        name, slash, inner = file.partition("/")
        root = origin.removesuffix(slash + inner)
        name = name.removesuffix(".py")
        other = _other_place(name)
        if other is not None and os.path.realpath(other) != os.path.realpath(root):
            raise UserError(f"code: {root}: this Python has another module {name}, {other}; rename yours")
    for name in [name for name, module in sys.modules.items() if getattr(module, "__loader__", None) is _finder]:
        del sys.modules[name]  # the new files may have another content
    _finder.files = dict(files)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def code_in_use() -> Files:
    """The files that are importable now."""
    return _finder.files


def digests(files: Files) -> dict[str, str]:
    """SHA-256 of each file."""
    return {file: hashlib.sha256(content).hexdigest() for file, (_, content) in files.items()}


def _other_place(name: str) -> str | None:
    """The file or folder of a module of this name that is not from here: an imported one, or one on the Python path."""
    module = sys.modules.get(name)
    spec = PathFinder.find_spec(name) if module is None or module.__loader__ is _finder else module.__spec__
    if spec is None or spec.origin is None:
        return None
    return next(iter(spec.submodule_search_locations or ()), spec.origin)


class _Finder(MetaPathFinder, SourceLoader):  # type: ignore[misc]  # of the types of Python itself
    """Imports the files."""

    def __init__(self) -> None:
        self.files: Files = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        file = self._file(fullname)
        if file is not None:
            # An empty list of places: all modules of a package come from here.
            inner: list[str] | None = [] if file.endswith("/__init__.py") else None
            return spec_from_file_location(fullname, self.files[file][0], loader=self, submodule_search_locations=inner)
        if any(file.startswith(fullname.replace(".", "/") + "/") for file in self.files):
            return ModuleSpec(fullname, None, is_package=True)  # a package without __init__.py
        return None

    def get_filename(self, fullname: str) -> str:
        file = self._file(fullname)
        if file is None:
            raise ImportError(f"no module {fullname}")
        return self.files[file][0]

    def get_data(self, path: str) -> bytes:
        for origin, content in self.files.values():
            if origin == path:
                return content
        raise OSError(f"no file {path}")

    def _file(self, module: str) -> str | None:
        place = module.replace(".", "/")
        return next((file for file in (f"{place}/__init__.py", f"{place}.py") if file in self.files), None)


_finder = _Finder()
