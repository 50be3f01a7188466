"""A run's copy elsewhere: a folder, NFS, or a bucket, through pyarrow as Ray has it.

    new checkpoints -> config.yaml, metrics.jsonl, ... -> checkpoints/index.json -> old ones go

No checkpoint there is ever written over, and its manifest comes after its files. So wherever a copy
is interrupted, the index names a complete checkpoint, and the copy is itself the folder of a run.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow
from pyarrow import fs

from ray_dmml.checkpoint.store import (
    STEP_FOLDER,
    CheckpointStore,
    DamagedError,
    dump_with_checksum,
    free_name,
    ignore,
    manifest_files,
    sync,
)
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.filesystem import open_uri, reason, without_secrets
from ray_dmml.training.run_dir import RunDir

RUN_FILES = ("config.yaml", "metrics.jsonl", "run.json", "results.json")


class RunStorage:
    """Where a run's state is copied to and fetched from.

    Args:
        uri: a folder, ``file://``, ``s3://bucket/folder``, ``gs://bucket/folder``. Options follow as a
            query: ``s3://bucket/folder?endpoint_override=http://host:9000&region=eu-west-1``.

    Raises:
        CheckpointError: the folder cannot be made, or the bucket's service does not answer.
        UserError: the URI is not understood.
    """

    def __init__(self, uri: str) -> None:
        self.name = without_secrets(uri)
        try:
            files, self._base = open_uri(uri)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"the storage {self.name} is not understood: {reason(error)}") from None
        except OSError as error:
            raise CheckpointError(
                f"the storage {self.name} cannot be reached: {reason(error)}"
            ) from None
        self._is_local = files.type_name == "local"
        self._has_folders = files.type_name not in ("s3", "gcs")
        self._files = fs.SubTreeFileSystem(self._base, files)

    def is_at(self, folder: Path) -> bool:
        """The storage is this very folder, as in a run that is continued in its storage."""
        return self._is_local and Path(self._base).resolve() == folder.resolve()

    def ensure_empty(self) -> None:
        """A new run never takes an old one's place.

        Raises:
            CheckpointError: the storage cannot be read.
            UserError: there is a run.
        """
        with self._told("read"):
            taken = self._has("config.yaml") or self._folders()
        if taken:
            raise UserError(f"the storage {self.name} has a run already; give another")

    def push(self, run: RunDir) -> None:
        """Copies what a run's folder has and the storage has not, and removes the checkpoints there
        that the run no longer keeps.

        Raises:
            CheckpointError: with the reason; the run's folder is only read, and the checkpoints that
                the storage had are whole.
        """
        store = run.checkpoints
        if self.is_at(run.path):
            raise CheckpointError(f"the storage {self.name} is the run's own folder")
        with self._told("written"):
            copies = self._push_checkpoints(store)
            for name in RUN_FILES:
                if (run.path / name).is_file():
                    with (run.path / name).open("rb") as file:
                        self._put(file, name)
            if not copies:
                return
            index = {which: copies[name] for which, name in store.index().items()}
            self._put(io.BytesIO(dump_with_checksum(index)), "checkpoints/index.json")
            for name in set(self._folders()) - set(copies.values()):
                self._files.delete_dir(f"checkpoints/{name}")

    def fetch(self, into: Path, warn: Callable[[str], None] = ignore) -> None:
        """Brings a run into a folder that is empty or not there yet, and verifies its last checkpoint,
        or an older one where that is damaged.

        Args:
            into: the folder; it stays as it is where anything fails.
            warn: is told what is damaged and what is used instead.

        Raises:
            CheckpointError: the storage or the folder does not work.
            UserError: the folder is taken, or there is no run or no usable checkpoint.
        """
        if into.exists() and (not into.is_dir() or any(into.iterdir())):
            raise UserError(f"{into} already exists; {self.name} is fetched into a new folder")
        aside = into.with_name(f".{into.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)

        def as_stored(message: str) -> str:
            return message.replace(str(aside), self.name.rstrip("/"))

        try:
            with self._told("fetched"):
                self._fetch(aside)
            store = CheckpointStore(aside / "checkpoints")
            store.load("last", lambda warning: warn(as_stored(warning)))
            with self._told("fetched"):
                os.replace(aside, into)
        except UserError as error:
            raise type(error)(as_stored(str(error))) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _push_checkpoints(self, store: CheckpointStore) -> dict[str, str]:
        """The name that each of the run's checkpoints has in the storage. It is another one where the
        storage has a checkpoint of that step with other content."""
        there = self._manifests()
        copies = {}
        for name in store.kept():
            manifest = (store.folder / name / "manifest.json").read_bytes()
            copy = next((each for each, found in there.items() if found == manifest), None)
            if copy is None:
                copy = free_name(name, there)
                for file in manifest_files(store.folder / name):
                    with (store.folder / name / file).open("rb") as content:
                        self._put(content, f"checkpoints/{copy}/{file}")
                self._put(io.BytesIO(manifest), f"checkpoints/{copy}/manifest.json")
                there[copy] = manifest
            copies[name] = copy
        return copies

    def _fetch(self, into: Path) -> None:
        if not self._has("config.yaml"):
            raise UserError(f"the storage {self.name} has no run")
        for name in (*RUN_FILES, "checkpoints/index.json"):
            self._get(name, into)
        for name in self._folders():
            folder = f"checkpoints/{name}"
            self._get(f"{folder}/manifest.json", into)
            # What cannot be had is missed by the reader. The names are checked: none leads elsewhere.
            with suppress(FileNotFoundError, DamagedError):
                for file in manifest_files(into / folder):
                    self._get(f"{folder}/{file}", into)

    def _folders(self) -> list[str]:
        """Names of the checkpoints in the storage, complete or not."""
        found = self._files.get_file_info(fs.FileSelector("checkpoints", allow_not_found=True))
        folders = [info.base_name for info in found if info.type == fs.FileType.Directory]
        return list(filter(STEP_FOLDER.fullmatch, folders))

    def _manifests(self) -> dict[str, bytes]:
        """The manifest of each checkpoint in the storage that has one."""
        found = {}
        for name in self._folders():
            if self._has(f"checkpoints/{name}/manifest.json"):
                with self._files.open_input_stream(f"checkpoints/{name}/manifest.json") as stream:
                    found[name] = stream.read()
        return found

    def _has(self, name: str) -> bool:
        return bool(self._files.get_file_info(name).type == fs.FileType.File)

    def _get(self, name: str, into: Path) -> None:
        """A file of the storage, if it is there."""
        if self._has(name):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            with (
                self._files.open_input_stream(name) as source,
                (into / name).open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)

    def _put(self, source: BinaryIO, name: str) -> None:
        """At any time the storage has the old file or the new one: an object appears when its last
        part has come, a file when it is renamed."""
        aside = f"{name}.tmp" if self._has_folders else name
        if self._has_folders and "/" in name:
            self._files.create_dir(os.path.dirname(name), recursive=True)
        with self._files.open_output_stream(aside) as target:
            shutil.copyfileobj(source, target, 2**20)
        if self._is_local:
            sync(Path(self._base, aside))
        if self._has_folders:
            self._files.move(aside, name)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pyarrow.ArrowException, DamagedError) as error:
            raise CheckpointError(
                f"the storage {self.name} cannot be {what}: {reason(error)}"
            ) from None
