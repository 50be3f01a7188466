"""The folder of a run: what is in it, and that nothing in it is overwritten unasked.

config.yaml     the effective config; `ray-dmml train --config` of it repeats the run
metrics.jsonl   a line a step (the terms of each peer's loss) and a line an evaluation
results.json    the test classes' figures
run.json        versions, threads, devices: what the bits of a result depend on besides
checkpoints/    see `checkpoint`
tensorboard/    events
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_dmml.checkpoint.store import CheckpointStore, sync
from ray_dmml.config.loading import read_settings, refuse_old
from ray_dmml.config.schema import Config
from ray_dmml.errors import CheckpointError, UserError

_VERSIONS = ("ray-dmml", "torch", "torchvision", "timm", "pytorch-metric-learning", "ray", "numpy")


class RunDir:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = CheckpointStore(path / "checkpoints")
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.results_file = path / "results.json"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """An existing run.

        Raises:
            UserError: the folder is not one of a run.
        """
        run = cls(Path(path))
        if not run.config_file.is_file():
            raise UserError(f"{path} is not the folder of a run: it has no config.yaml")
        return run

    def ensure_empty(self, option: str = "--out") -> None:
        """A new run never writes into an old one's folder.

        Args:
            option: by which a user gives another.

        Raises:
            UserError: the folder is taken.
        """
        # A file written aside is what is left where a run was killed before it had a config.
        if self.path.exists() and (
            not self.path.is_dir() or any(path.suffix != ".tmp" for path in self.path.iterdir())
        ):
            raise UserError(
                f"{self.path} already exists; give another {option}, or continue it with "
                f"--resume {self.path}"
            )

    def make(self) -> None:
        """The folder itself. Raises UserError where it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be made: {error}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """For the length of the block no other process trains in this folder.

        A file system that knows no locks protects nobody.

        Raises:
            UserError: one does.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(f"another process is training in {self.path}") from None
            yield
        finally:
            os.close(folder)

    def write_config(self, config: Config) -> None:
        replace_file(self.config_file, config.to_yaml())

    def config(self) -> Config:
        raw = read_settings(self.config_file)
        refuse_old(raw, self.config_file)
        return Config.parse(raw, source=str(self.config_file))

    def write_environment(self, **facts: Any) -> None:
        versions = {}
        for name in _VERSIONS:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
        found = {"python": platform.python_version(), "machine": platform.machine()}
        replace_file(
            self.path / "run.json", json.dumps({**facts, **found, "versions": versions}, indent=1)
        )

    def environment(self) -> dict[str, Any]:
        """What :meth:`write_environment` wrote; empty where it never did."""
        try:
            found: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """All of them, or none.

        Raises:
            CheckpointError: they cannot be written.
        """
        rest = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            # Unbuffered: a buffer would write what it holds once more when the file is closed.
            with self.metrics_file.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise CheckpointError(f"{self.metrics_file} cannot be written: {error}") from None

    def sync_metrics(self) -> None:
        """Returns when all that was appended is on the disk. Raises CheckpointError."""
        if self.metrics_file.exists():
            try:
                sync(self.metrics_file)
            except OSError as error:
                raise CheckpointError(f"{self.metrics_file} cannot be written: {error}") from None

    def truncate_metrics(self, step: int) -> None:
        """Drops what was written after ``step``, and a last line cut short, so that the file of a
        resumed run equals that of an undisturbed one."""
        if not self.metrics_file.exists():
            return
        # Rows come in the order of their steps: it is cut in its place, which needs no room.
        end = read = 0
        try:
            with self.metrics_file.open("rb+") as file:
                for line in file:
                    read += len(line)
                    try:
                        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                            break
                        end = read
                    except (ValueError, KeyError, TypeError):
                        continue
                file.truncate(end)
        except OSError as error:
            raise CheckpointError(f"{self.metrics_file} cannot be cut: {error}") from None

    def write_results(self, results: dict[str, Any]) -> None:
        replace_file(self.results_file, json.dumps(results, indent=1) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Writes a file aside and puts it in place: nobody reads half of it.

    Raises:
        CheckpointError: it cannot be written; what was there before is whole.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise CheckpointError(f"{path} cannot be written: {error}") from None
