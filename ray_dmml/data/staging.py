"""A node's own copy of the images, from a folder or a bucket: made once, verified, shared by all.

Whoever comes first holds the folder's lock and copies what is missing; the others wait for it. A copy
that was broken off goes on where it was: a file has its name only when it is whole. A run trusts a
finished copy; `ray-dmml data fetch` compares it with what the source has by now.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.cache import default_folder
from ray_dmml.errors import UserError

DIGESTS = "SHA256SUMS"
"""A file of the source, as `sha256sum` writes it: what it lists is verified by its content, all else by
its size."""

DONE = ".fetched.json"
COPIED = ".fetched.files.json"
"""What was copied, each file with the source's time of change: what has another one by now is copied
again, and what the source has no more is removed. Other files of the folder are somebody else's."""

LOCK = ".fetch.lock"
_OWN = frozenset({DONE, COPIED, LOCK})
_OUTDATED = -1
"""For a time of change: there are older bytes under that name."""

NUM_THREADS = 16
"""Files copied at a time: of small ones most of the time is waiting."""

CHUNK_BYTES = 2**20

Log = Callable[[str], None]


def local_root(config: DataConfig) -> Path:
    """The folder of the images on this machine, copied there or not.

    Raises:
        UserError: it would be in the home folder, and there is none.
    """
    if config.root is not None:
        return config.root
    name = hashlib.sha256(str(config.source).encode()).hexdigest()[:16]
    try:
        return (config.cache_dir or default_folder()) / "sources" / name
    except OSError as error:
        raise UserError(
            f"data.source: no place for a copy ({error.strerror}); set data.root"
        ) from None


def fetch(config: DataConfig, log: Log, *, again: bool = False) -> Path:
    """The folder of the images on this machine; what ``data.source`` has and the folder has not is copied.

    Args:
        config: which data set.
        log: is told what is copied.
        again: looks at the source even where there is a finished copy of it, for what was added,
            changed or removed there since. Not while a run reads the copy.

    Raises:
        UserError: the source cannot be read, or does not hold what it says; the disk is full; the folder
            is a finished copy of another source, which only ``again`` replaces.
    """
    root = local_root(config)
    if config.source is None:
        return root
    done = {} if again else _done(root)
    if done.get("source") == _identity(config.source):
        return root
    from ray_dmml.filesystem import reason, without_secrets  # which take half a second

    name = without_secrets(config.source)
    if done:
        raise UserError(
            f"data.root {root} holds a copy of {done.get('name')}, and not of data.source {name}: give "
            "data.root another folder, or replace that copy by `ray-dmml data fetch`"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            if again or not _is_done(root, config.source):  # by another process, meanwhile
                _copy(config.source, name, root, log)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"data.source {name} is not understood: {reason(error)}") from None
    except OSError as error:
        raise UserError(f"data.source {name} cannot be copied to {root}: {reason(error)}") from None
    return root


def _is_done(root: Path, source: str) -> bool:
    return bool(_done(root).get("source") == _identity(source))


def _done(root: Path) -> dict[str, Any]:
    """What is known of a finished copy; nothing where there is none."""
    try:
        done: Any = json.loads((root / DONE).read_text())
    except (OSError, ValueError):
        return {}
    return done if isinstance(done, dict) else {}


def _identity(source: str) -> str:
    """A digest, as a URI may hold secrets."""
    return hashlib.sha256(source.encode()).hexdigest()


@dataclass(frozen=True)
class _Listing:
    """What a source has, by path."""

    folder: Any
    """Its file system."""

    sizes: Mapping[str, int]
    times: Mapping[str, int | None]
    """Of change, where the source tells."""

    digests: Mapping[str, str]
    """Of those that its ``SHA256SUMS`` lists."""


def _list(source: str, name: str) -> _Listing:
    """Raises UserError."""
    from pyarrow import fs

    from ray_dmml.filesystem import open_uri

    files, base = open_uri(source, make=False)
    folder = fs.SubTreeFileSystem(base, files)
    found = folder.get_file_info(fs.FileSelector("", recursive=True))
    # A source may be such a copy itself.
    infos = [info for info in found if info.type == fs.FileType.File and info.path not in _OWN]
    if not infos:
        raise UserError(f"data.source {name} has no files")
    sizes = {info.path: int(info.size) for info in infos}
    for path in sizes:
        if not _is_inside(path):
            raise UserError(f"data.source {name}: {path!r} is outside the folder")
    digests = _digests(folder, name) if DIGESTS in sizes else {}
    absent = sorted(digests.keys() - sizes.keys())
    if absent:
        raise UserError(f"data.source {name} has no {absent[0]}, which its {DIGESTS} lists")
    return _Listing(folder, sizes, {info.path: info.mtime_ns for info in infos}, digests)


def _copy(source: str, name: str, root: Path, log: Log) -> None:
    listing = _list(source, name)
    sizes, times = listing.sizes, listing.times
    copied = _copied(root)
    missing = [path for path in sizes if not _has(root, path, listing, copied)]
    gone = sorted(copied.keys() - sizes.keys())
    if not missing and not gone and _is_done(root, source):
        log(f"{root} has all {len(sizes)} files of {name}")
        return
    outdated = [path for path in missing if (root / path).exists()]
    num_bytes = sum(sizes[path] for path in missing)
    _require_room(num_bytes, [*outdated, *gone], root, name)
    log(
        f"copying {len(missing)} of {len(sizes)} files ({_gib(num_bytes)}) from {name} to {root}"
        + (f", removing {len(gone)} that are there no more" if gone else "")
    )
    (root / DONE).unlink(missing_ok=True)  # nobody is to trust a copy of both
    for path in gone:
        _remove(root, path)
        del copied[path]
    copied |= {path: times[path] for path in missing}
    _write(root / COPIED, copied | dict.fromkeys(outdated, _OUTDATED))

    def get(path: str) -> None:
        _get(listing, path, root, name)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            for _ in pool.map(get, missing):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _write(root / COPIED, copied)
    os.sync()  # the mark of a whole copy must not outlive the copy where the machine dies
    done = {
        "source": _identity(source),
        "name": name,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
    }
    _write(root / DONE, done)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(content))
    os.replace(aside, path)


def _copied(root: Path) -> dict[str, int | None]:
    """The files under ``root`` that came from a source, with their times of change there."""
    try:
        found: Any = json.loads((root / COPIED).read_text())
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _remove(root: Path, path: str) -> None:
    """A file that was copied, what is left of a try to copy it, and folders that are empty then."""
    target = root / path
    # The list may be a stranger's who packed the folder.
    if not _is_inside(path) or not target.parent.resolve().is_relative_to(root.resolve()):
        return
    target.unlink(missing_ok=True)
    _aside(target).unlink(missing_ok=True)
    for folder in target.parents:
        if folder == root:
            return
        try:
            folder.rmdir()
        except OSError:  # something else is in it
            return


def _require_room(num_bytes: int, replaced: Iterable[str], root: Path, name: str) -> None:
    free = shutil.disk_usage(root).free
    free += sum((root / path).stat().st_size for path in replaced if (root / path).exists())
    if num_bytes > free:
        raise UserError(
            f"data.source {name}: {_gib(num_bytes)} are to be copied to {root}, and {_gib(free)} are free: "
            "set data.root to a folder of a larger disk"
        )


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _get(listing: _Listing, path: str, root: Path, name: str) -> None:
    """One file, under its name once it is whole."""
    size, digest = listing.sizes[path], listing.digests.get(path)
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    content = hashlib.sha256()
    num_bytes = 0
    with listing.folder.open_input_stream(path) as stream, aside.open("wb") as file:
        while chunk := stream.read(CHUNK_BYTES):
            content.update(chunk)
            num_bytes += len(chunk)
            file.write(chunk)
    if num_bytes != size or (digest is not None and content.hexdigest() != digest):
        aside.unlink()
        what = (
            f"{num_bytes} bytes came, not {size}" if num_bytes != size else f"not that of {DIGESTS}"
        )
        raise UserError(f"data.source {name}: the content of {path} is damaged ({what})")
    os.replace(aside, target)


def _has(root: Path, path: str, listing: _Listing, copied: Mapping[str, int | None]) -> bool:
    """Whether the file is that of the source: by its content where there is a digest, else by its size,
    and its time of change if it was copied."""
    digest, time = listing.digests.get(path), listing.times[path]
    try:
        if (root / path).stat().st_size != listing.sizes[path]:
            return False
        if digest is None:
            return copied.get(path, time) == time
        with (root / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def _digests(folder: Any, name: str) -> Mapping[str, str]:
    """By path. Raises UserError."""
    with folder.open_input_stream(DIGESTS) as stream:
        content = stream.read()
    found = {}
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        lines = ["?"]
    for number, line in enumerate(lines, start=1):
        digest, gap, path = line[:64], line[64:66], line[66:].removeprefix("./")
        if gap not in ("  ", " *") or not path or set(digest) - set("0123456789abcdef"):
            raise UserError(
                f"data.source {name}: line {number} of {DIGESTS} is not what sha256sum writes"
            )
        found[path] = digest
    return found


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes > 2**27 else f"{num_bytes / 2**20:.1f} MiB"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process of the machine at a time, however long the other takes; the lock ends with its holder."""
    import fcntl

    file = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
