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

from ray_dmml.checkpoint.manifest import DamagedError, dump_with_checksum, read_manifest
from ray_dmml.checkpoint.store import STEP_FOLDER, CheckpointStore, free_name, sync
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.filesystem import open_uri, reason, without_secrets

logger = logging.getLogger(__name__)

RUN_FILES = ("config.yaml", "metrics.jsonl", "run.json", "results.json")


class RemoteRun:
    """The copy of a run at a URI.

    Args:
        uri: a folder, ``file://``, ``s3://bucket/folder`` or ``gs://bucket/folder``. Options follow as a
            query: ``s3://bucket/folder?endpoint_override=http://host:9000&region=eu-west-1``.

    Attributes:
        name: the URI without secrets, for messages.
        files: pyarrow file system whose root is the copy.

    Raises:
        CheckpointError: the folder cannot be created, or the bucket's service does not answer.
        UserError: the URI is not valid.
    """

    def __init__(self, uri: str) -> None:
        self.name = without_secrets(uri)
        try:
            files, self._base = open_uri(uri)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"the storage {self.name} is not understood: {reason(error)}") from None
        except OSError as error:
            raise CheckpointError(f"the storage {self.name} cannot be reached: {reason(error)}") from None
        self._is_local = files.type_name == "local"
        self._has_folders = files.type_name not in ("s3", "gcs")
        self.files: fs.FileSystem = fs.SubTreeFileSystem(self._base, files)

    def is_at(self, folder: Path) -> bool:
        """Whether the copy is this very folder, as in a run that continues in its storage."""
        return self._is_local and Path(self._base).resolve() == folder.resolve()

    def ensure_empty(self) -> None:
        """Makes sure that a new run does not replace an older one.

        Raises:
            CheckpointError: the storage cannot be read.
            UserError: it contains a run.
        """
        with self._errors("read"):
            is_taken = self._has("config.yaml") or self._checkpoints()
        if is_taken:
            raise UserError(f"the storage {self.name} has a run already; give another")

    def push(self, folder: Path) -> None:
        """Copies what is new in the folder of a run, and removes checkpoints that the run has removed.

        Args:
            folder: the run's folder, which is only read.

        Raises:
            CheckpointError: the storage does not work, or it is the folder itself. The checkpoints that
                the copy had are unchanged.
        """
        if self.is_at(folder):
            raise CheckpointError(f"the storage {self.name} is the run's own folder")
        store = CheckpointStore(folder / "checkpoints")
        with self._errors("written"):
            copies = self._push_checkpoints(store)
            for name in RUN_FILES:
                if (folder / name).is_file():
                    with (folder / name).open("rb") as file:
                        self._put(file, name)
            if not copies:
                return
            index = {which: copies[name] for which, name in store.index().items()}
            self._put(io.BytesIO(dump_with_checksum(index)), "checkpoints/index.json")
            for name in set(self._checkpoints()) - set(copies.values()):
                self.files.delete_dir(f"checkpoints/{name}")

    def fetch(self, into: Path) -> None:
        """Copies the run into a new folder and verifies its last checkpoint.

        If that is damaged, an older one is the last, and a warning is logged.

        Args:
            into: an empty folder, or one that does not exist. It is unchanged if anything fails.

        Raises:
            CheckpointError: the storage or the folder does not work.
            UserError: the folder is taken, or the storage has no run or no usable checkpoint.
        """
        if into.exists() and (not into.is_dir() or any(into.iterdir())):
            raise UserError(f"{into} already exists; {self.name} is fetched into a new folder")
        logger.debug("fetching the run from %s", self.name)
        temporary = into.with_name(f".{into.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)

        def in_storage(message: str) -> str:
            """Names the damaged file's place in the storage."""
            return message.replace(str(temporary), self.name.rstrip("/"))

        try:
            with self._errors("fetched"):
                self._fetch(temporary)
            _, warnings = CheckpointStore(temporary / "checkpoints").load_with_warnings("last")
            with self._errors("fetched"):
                os.replace(temporary, into)
        except UserError as error:
            raise type(error)(in_storage(str(error))) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for warning in warnings:
            logger.warning(in_storage(warning))

    def _push_checkpoints(self, store: CheckpointStore) -> dict[str, str]:
        """Copies new checkpoints. Returns the name in the copy by the name in the run.

        The names differ where the copy has a checkpoint of the same step with other content.
        """
        manifests = self._manifests()
        copies = {}
        for name in store.names():
            manifest = (store.folder / name / "manifest.json").read_bytes()
            copy = next((each for each, content in manifests.items() if content == manifest), None)
            if copy is None:
                copy = free_name(name, manifests)
                for file in read_manifest(store.folder / name)["files"]:
                    with (store.folder / name / file).open("rb") as content:
                        self._put(content, f"checkpoints/{copy}/{file}")
                self._put(io.BytesIO(manifest), f"checkpoints/{copy}/manifest.json")
                manifests[copy] = manifest
            copies[name] = copy
        return copies

    def _fetch(self, into: Path) -> None:
        if not self._has("config.yaml"):
            raise UserError(f"the storage {self.name} has no run")
        for name in (*RUN_FILES, "checkpoints/index.json"):
            self._get(name, into)
        for name in self._checkpoints():
            folder = f"checkpoints/{name}"
            self._get(f"{folder}/manifest.json", into)
            # The store reports what is missing. A manifest names no file outside of its folder.
            with suppress(FileNotFoundError, DamagedError):
                for file in read_manifest(into / folder)["files"]:
                    self._get(f"{folder}/{file}", into)

    def _checkpoints(self) -> list[str]:
        """Names of the checkpoints in the copy, complete or not."""
        infos = self.files.get_file_info(fs.FileSelector("checkpoints", allow_not_found=True))
        folders = [info.base_name for info in infos if info.type == fs.FileType.Directory]
        return list(filter(STEP_FOLDER.fullmatch, folders))

    def _manifests(self) -> dict[str, bytes]:
        """The manifests in the copy by the name of the checkpoint."""
        manifests = {}
        for name in self._checkpoints():
            if self._has(f"checkpoints/{name}/manifest.json"):
                with self.files.open_input_stream(f"checkpoints/{name}/manifest.json") as stream:
                    manifests[name] = stream.read()
        return manifests

    def _has(self, name: str) -> bool:
        return bool(self.files.get_file_info(name).type == fs.FileType.File)

    def _get(self, name: str, into: Path) -> None:
        """Copies a file from the storage if it exists."""
        if self._has(name):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            with self.files.open_input_stream(name) as source, (into / name).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)

    def _put(self, source: BinaryIO, name: str) -> None:
        """Replaces a file in one step: an object appears with its last part, a file by a rename."""
        temporary = f"{name}.tmp" if self._has_folders else name
        if self._has_folders and "/" in name:
            self.files.create_dir(os.path.dirname(name), recursive=True)
        with self.files.open_output_stream(temporary) as target:
            shutil.copyfileobj(source, target, 2**20)
        if self._is_local:
            sync(Path(self._base, temporary))
        if self._has_folders:
            self.files.move(temporary, name)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns errors inside the block into CheckpointError: the storage cannot be ``what``."""
        try:
            yield
        except (OSError, pyarrow.ArrowException, DamagedError) as error:
            raise CheckpointError(f"the storage {self.name} cannot be {what}: {reason(error)}") from None
