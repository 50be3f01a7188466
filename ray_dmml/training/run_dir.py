"""The folder of a run: what is in it, and that nothing in it is overwritten unasked.

config.yaml     the effective config; `ray-dmml train --config` of it repeats the run
metrics.jsonl   a line a step (the loss terms of each peer) and a line an evaluation
results.json    the figures of the final evaluation
report.html     a page for people, see :mod:`~ray_dmml.report`
run.json        versions, threads, devices: what else the bits of a result depend on
images.csv.gz   the images: names, sizes, classes and splits, see :mod:`~ray_dmml.training.image_list`
checkpoints/    see :mod:`~ray_dmml.checkpoint.store`
tensorboard/    TensorBoard events
loggers/        which run of a service (`train.loggers`) shows this one
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_dmml.atomic_files import replace_file
from ray_dmml.checkpoint.store import CheckpointStore
from ray_dmml.config.loading import read_settings, refuse_old
from ray_dmml.config.schema import Config
from ray_dmml.cores import num_cores
from ray_dmml.errors import UserError
from ray_dmml.training.provenance import commit, cpu

_VERSIONS = ("ray-dmml", "torch", "torchvision", "timm", "pytorch-metric-learning", "ray", "numpy")


class RunDir:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = CheckpointStore(path / "checkpoints")
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.results_file = path / "results.json"
        self.report_file = path / "report.html"
        self.environment_file = path / "run.json"
        self.images_file = path / "images.csv.gz"
        self.tensorboard = path / "tensorboard"
        self.loggers = path / "loggers"
        self._files = (
            self.config_file,
            self.metrics_file,
            self.results_file,
            self.report_file,
            self.environment_file,
            self.images_file,
        )

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """An existing run. Raises UserError if the folder is not one."""
        run_dir = cls(Path(path))
        if not run_dir.exists():
            raise UserError(f"{path} is not the folder of a run: it has no config.yaml")
        return run_dir

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return os.path.isfile(self.config_file)

    def ensure_empty(self) -> None:
        """Raises UserError if the folder holds something."""
        try:
            # A run that was killed before it had a config leaves nothing but files with this suffix.
            is_taken = any(path.suffix != ".tmp" for path in self.path.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            is_taken = os.path.isfile(self.path)
            if not is_taken:
                raise UserError(f"the run folder {self.path} cannot be used: {error.strerror}") from None
        if is_taken:
            raise UserError(f"{self.path} already exists; give another folder (out), or continue this run (resume)")

    def create(self) -> None:
        """Makes the folder. Raises UserError if that is not possible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be created: {error}") from None

    def discard(self) -> None:
        """Removes what a run has written, but no other file, and the folder if it is empty then."""
        for folder in (self.checkpoints.folder, self.tensorboard, self.loggers):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self._files:
            file.unlink(missing_ok=True)
            file.with_name(file.name + ".tmp").unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other processes from training in this folder, see :func:`lock_folder`."""
        return lock_folder(self.path, "training")

    def write_config(self, config: Config) -> None:
        """Writes config.yaml where it differs."""
        text = config.to_yaml()
        if not self.exists() or self.config_file.read_text(encoding="utf-8") != text:
            replace_file(self.config_file, text)

    def config(self) -> Config:
        """The run's own config. Raises UserError if config.yaml is not one of this version."""
        raw = read_settings(self.config_file)
        refuse_old(raw, self.config_file)
        return Config.parse(raw, source=str(self.config_file))

    def write_environment(self, **facts: Any) -> None:
        """Writes run.json: the facts given, and versions of what the bits depend on."""
        machine = {
            **{"python": platform.python_version(), "machine": platform.machine()},
            **{"cpu": cpu(), "cores": num_cores(), "commit": commit()},
        }
        environment = {**facts, **machine, "versions": versions_of(*_VERSIONS)}
        replace_file(self.environment_file, json.dumps(environment, indent=1))

    def environment(self) -> dict[str, Any]:
        """What :meth:`write_environment` wrote; empty if it never did, or the file is damaged."""
        try:
            environment = json.loads(self.environment_file.read_text())
        except (OSError, ValueError):
            return {}
        return environment if isinstance(environment, dict) else {}

    def write_results(self, results: dict[str, Any]) -> None:
        replace_file(self.results_file, json.dumps(results, indent=1) + "\n")

    def results(self) -> dict[str, Any] | None:
        """What :meth:`write_results` wrote; None: the run has not ended. Raises UserError if the file is damaged."""
        try:
            results = json.loads(self.results_file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.results_file} cannot be read: {error}") from None
        if not isinstance(results, dict) or not {"peers", "ensemble", "split", "step"} <= results.keys():
            raise UserError(f"{self.results_file} does not hold the results of a run")
        return results


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of installed packages, or ``not installed``, by name."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@contextmanager
def lock_folder(path: Path, doing: str) -> Iterator[None]:
    """Keeps other processes from ``doing`` the same in a folder; a file system without locks does not protect it.

    Raises:
        UserError: another process has the lock, or the folder cannot be used.
    """
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"another process is {doing} in {path}") from None
        yield
    finally:
        os.close(folder)
