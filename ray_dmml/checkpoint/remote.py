"""A copy of a run in another place: a folder, NFS, or a bucket, through pyarrow.

A push writes in this order:

    new checkpoints -> config.yaml, metrics.jsonl, ... -> checkpoints/index.json -> removal of old ones

It never overwrites a checkpoint in the copy, and it writes a manifest after the files. After an
interruption at any point the index names a complete checkpoint, and the copy is itself a run's folder.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow
from pyarrow import fs

from ray_dmml.atomic_files import wait_for_disk
from ray_dmml.checkpoint.manifest import DamagedError, dump_with_checksum, read_manifest
from ray_dmml.checkpoint.peer_files import CHUNK
from ray_dmml.checkpoint.store import STEP_FOLDER, CheckpointStore, free_name
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.filesystem import open_uri, reason, without_secrets

logger = logging.getLogger(__name__)

RUN_FILES = (
    *("config.yaml", "metrics.jsonl", "run.json", "images.csv.gz", "results.json", "report.html"),
    *("loggers/wandb.json", "loggers/mlflow.json", "loggers/trackio.json"),
)


class RemoteRun:
    """The copy of a run at a URI.

    Args:
        uri: a folder, ``file://``, ``s3://bucket/folder`` or ``gs://bucket/folder``. Options follow as a
            query: ``s3://bucket/folder?endpoint_override=http://host:9000&region=eu-west-1``.

    Raises:
        CheckpointError: the folder cannot be created, or the bucket's service does not answer.
        UserError: the URI is not valid.
    """

    def __init__(self, uri: str) -> None:
        self.name = without_secrets(uri)  # for messages
        try:
            files, self._base = open_uri(uri)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"the storage {self.name} is not understood: {reason(error)}") from None
        except OSError as error:
            raise CheckpointError(f"the storage {self.name} cannot be reached: {reason(error)}") from None
        self._is_local = files.type_name == "local"
        self._has_folders = files.type_name not in ("s3", "gcs")
        self.files: fs.FileSystem = fs.SubTreeFileSystem(self._base, files)  # its root is the copy

    def is_at(self, folder: Path) -> bool:
        """Whether the copy is this very folder, as in a run that continues in its storage."""
        return self._is_local and Path(self._base).resolve() == folder.resolve()

    def ensure_empty(self) -> None:
        """Raises UserError if the storage contains a run, and CheckpointError if it cannot be read."""
        with self._errors("read"):
            if self._read("config.yaml") is not None or self._checkpoints():
                raise UserError(f"the storage {self.name} has a run already; give another")

    def push(self, folder: Path) -> None:
        """Copies what is new in the folder of a run, and removes checkpoints that the run has removed.

        Raises:
            CheckpointError: the storage does not work, or is the folder itself. Its checkpoints are unchanged.
        """
        if self.is_at(folder):
            raise CheckpointError(f"the storage {self.name} is the run's own folder")
        store = CheckpointStore(folder / "checkpoints")
        with self._errors("written"):
            stored = {name: self._read(f"checkpoints/{name}/manifest.json") for name in self._checkpoints()}
            manifests = {name: manifest for name, manifest in stored.items() if manifest is not None}
            names = {}  # in the copy: they differ where it has a checkpoint of the same step with other content
            for name in store.names():
                manifest = (store.folder / name / "manifest.json").read_bytes()
                copy = next((each for each, content in manifests.items() if content == manifest), None)
                if copy is None:
                    copy = free_name(name, manifests)
                    for file in read_manifest(store.folder / name)["files"]:
                        self._put_file(store.folder / name / file, f"checkpoints/{copy}/{file}")
                    self._put(io.BytesIO(manifest), f"checkpoints/{copy}/manifest.json")
                    manifests[copy] = manifest
                names[name] = copy
            for name in RUN_FILES:
                if (folder / name).is_file():
                    self._put_file(folder / name, name)
            if names:
                index = {which: names[name] for which, name in store.index().items()}
                self._put(io.BytesIO(dump_with_checksum(index)), "checkpoints/index.json")
                for name in set(self._checkpoints()) - set(names.values()):
                    self.files.delete_dir(f"checkpoints/{name}")

    def fetch(self, into: Path) -> None:
        """Copies the run into an empty or new folder, which is unchanged if anything fails.

        If the last checkpoint is damaged, an older one is the last, and a warning is logged.

        Raises:
            CheckpointError: the storage or the folder does not work.
            UserError: the folder is taken, or the storage has no run or no usable checkpoint.
        """
        if into.exists() and (not into.is_dir() or any(into.iterdir())):
            raise UserError(f"{into} already exists; {self.name} is fetched into a new folder")
        logger.debug("fetching the run from %s", self.name)
        temporary = into.with_name(f".{into.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        names = str(temporary), self.name.rstrip("/")  # messages name the damaged file in the storage
        try:
            with self._errors("fetched"):
                self._fetch(temporary)
                _, warnings = CheckpointStore(temporary / "checkpoints").load_with_warnings("last")
                os.replace(temporary, into)
        except UserError as error:
            raise type(error)(str(error).replace(*names)) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for warning in warnings:
            logger.warning(warning.replace(*names))

    def _fetch(self, into: Path) -> None:
        def get(name: str) -> None:
            if self._has(name):
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                with self.files.open_input_stream(name) as source, (into / name).open("wb") as target:
                    shutil.copyfileobj(source, target, CHUNK)

        for name in (*RUN_FILES, "checkpoints/index.json"):
            get(name)
        if not (into / "config.yaml").exists():
            raise UserError(f"the storage {self.name} has no run")
        for name in self._checkpoints():
            folder = f"checkpoints/{name}"
            get(f"{folder}/manifest.json")
            # The store reports what is missing. A manifest names no file outside of its folder.
            with suppress(FileNotFoundError, DamagedError):
                for file in read_manifest(into / folder)["files"]:
                    get(f"{folder}/{file}")

    def _checkpoints(self) -> list[str]:
        """Names of the checkpoints in the copy, complete or not."""
        infos = self.files.get_file_info(fs.FileSelector("checkpoints", allow_not_found=True))
        folders = (info.base_name for info in infos if info.type == fs.FileType.Directory)
        return [name for name in folders if STEP_FOLDER.fullmatch(name)]

    def _read(self, name: str) -> bytes | None:
        """The content of a small file in the storage, None if it does not exist."""
        if not self._has(name):
            return None
        with self.files.open_input_stream(name) as stream:
            return stream.read()

    def _has(self, name: str) -> bool:
        return bool(self.files.get_file_info(name).type == fs.FileType.File)

    def _put_file(self, path: Path, name: str) -> None:
        with path.open("rb") as source:
            self._put(source, name)

    def _put(self, source: BinaryIO, name: str) -> None:
        """Replaces a file in one step: an object appears with its last part, a file by a rename."""
        temporary = f"{name}.tmp" if self._has_folders else name
        if self._has_folders and "/" in name:
            self.files.create_dir(os.path.dirname(name), recursive=True)
        with self.files.open_output_stream(temporary) as target:
            shutil.copyfileobj(source, target, CHUNK)
        if self._is_local:
            wait_for_disk(Path(self._base, temporary))
        if self._has_folders:
            self.files.move(temporary, name)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns errors inside the block into CheckpointError: the storage cannot be ``what``."""
        try:
            yield
        except (OSError, pyarrow.ArrowException, DamagedError) as error:
            raise CheckpointError(f"the storage {self.name} cannot be {what}: {reason(error)}") from None
