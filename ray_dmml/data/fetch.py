"""A node's own copy of the images, from a folder or a bucket: made once, verified, shared by all.

Whoever comes first holds the folder's lock and copies what is missing; the others wait for it. A copy
that was broken off goes on where it was: a file has its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ray_dmml.config import DataConfig
from ray_dmml.data.cache import default_folder
from ray_dmml.errors import UserError

DIGESTS = "SHA256SUMS"
"""A file of the source, as `sha256sum` writes it: what it lists is verified by its content, all else by
its size."""

DONE = ".fetched.json"
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


def fetch(config: DataConfig, log: Log) -> Path:
    """The folder of the images on this machine; what ``data.source`` has and the folder has not is copied.

    Args:
        config: which data set.
        log: is told what is copied.

    Raises:
        UserError: the source cannot be read, or does not hold what it says; the disk is full.
    """
    root = local_root(config)
    if config.source is None or _is_done(root, config.source):
        return root
    from ray_dmml.uri import reason, without_secrets  # which take half a second

    name = without_secrets(config.source)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            if not _is_done(root, config.source):  # by another process, meanwhile
                _copy(config.source, name, root, log)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"data.source {name} is not understood: {reason(error)}") from None
    except OSError as error:
        raise UserError(f"data.source {name} cannot be copied to {root}: {reason(error)}") from None
    return root


def _is_done(root: Path, source: str) -> bool:
    try:
        done: Any = json.loads((root / DONE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(done, dict) and done.get("source") == _identity(source)


def _identity(source: str) -> str:
    """A digest, as a URI may hold secrets."""
    return hashlib.sha256(source.encode()).hexdigest()


def _copy(source: str, name: str, root: Path, log: Log) -> None:
    from pyarrow import fs

    from ray_dmml.uri import open_uri

    files, base = open_uri(source, make=False)
    folder = fs.SubTreeFileSystem(base, files)
    found = folder.get_file_info(fs.FileSelector("", recursive=True))
    sizes = {info.path: int(info.size) for info in found if info.type == fs.FileType.File}
    if not sizes:
        raise UserError(f"data.source {name} has no files")
    digests = _digests(folder, name) if DIGESTS in sizes else {}
    absent = sorted(digests.keys() - sizes.keys())
    if absent:
        raise UserError(f"data.source {name} has no {absent[0]}, which its {DIGESTS} lists")
    for path in sizes:
        _require_inside(path, name)
    missing = [
        path for path, size in sizes.items() if not _has(root / path, size, digests.get(path))
    ]
    num_bytes = sum(sizes[path] for path in missing)
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise UserError(
            f"data.source {name}: {_gib(num_bytes)} are to be copied to {root}, and {_gib(free)} are free: "
            "set data.root to a folder of a larger disk"
        )
    log(f"copying {len(missing)} of {len(sizes)} files ({_gib(num_bytes)}) from {name} to {root}")

    def get(path: str) -> None:
        _get(folder, path, root, sizes[path], digests.get(path), name)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            for _ in pool.map(get, missing):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    done = {
        "source": _identity(source),
        "name": name,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
    }
    aside = root / f"{DONE}.part"
    aside.write_text(json.dumps(done))
    os.replace(aside, root / DONE)


def _get(folder: Any, path: str, root: Path, size: int, digest: str | None, name: str) -> None:
    """One file, under its name once it is whole."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    content = hashlib.sha256()
    num_bytes = 0
    with folder.open_input_stream(path) as stream, aside.open("wb") as file:
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


def _has(path: Path, size: int, digest: str | None) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        if digest is None:
            return True
        with path.open("rb") as file:
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


def _require_inside(path: str, name: str) -> None:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or not parts:
        raise UserError(f"data.source {name}: {path!r} is outside the folder")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes > 2**27 else f"{num_bytes / 2**20:.1f} MiB"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process of the machine at a time, however long the other takes; the lock ends with its holder."""
    import fcntl

    file = os.open(root / ".fetch.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
