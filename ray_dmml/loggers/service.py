"""What loggers of services have in common, such as Weights & Biases.

A thread of its own talks to the service. A service that is slow, fails or hangs costs training one warning.
"""

from __future__ import annotations

import json
import logging
import re
from abc import abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ray_dmml.atomic_files import replace_file
from ray_dmml.config.parts import describe
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.loggers.logger import Logger
from ray_dmml.loggers.scalars import Scalars

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Rows that wait for a service. Further ones are lost."""

MAX_WAITING_PICTURES = 50
"""Further pictures are lost, too: one has about 2 MB, and a service that hangs must not fill the memory."""

Row: TypeAlias = "tuple[str, int, Mapping[str, float], Mapping[str, np.ndarray]]"
"""What is sent at a time: its kind, its step, numbers by name, and pictures by name, uint8 (H, W, 3)."""


class ServiceLogger(Logger):
    """A run in a service. Subclasses say how the service is called; only the thread calls these methods.

    RUN/loggers/NAME.json holds the id of the run in the service, so that a resumed run goes on in the same one, and the
    last steps that were sent. After the loss of a peer, and in a resumed run, steps come again with the same values.
    They are not sent again.

    Args:
        config: the experiment.
        folder: that of the run. It may not exist yet.
        name: of the run in the service; None: that of the folder.
    """

    service: ClassVar[str]
    """Short name, which is also that of the extra and of the package to import."""

    takes_pictures = True

    close_s = 60.0
    """Seconds that the end of a run waits for what is not sent yet."""

    def __init__(self, config: Config, folder: Path, name: str | None = None) -> None:
        require_service(self.service, "train.loggers")
        self.config, self.folder, self.name = config, folder, name or folder.resolve().name
        self.is_finished = False
        """Whether the run has come to its end; a run that was interrupted or has failed has not."""
        self._file = folder / "loggers" / f"{self.service}.json"
        self._scalars = Scalars()
        self._waiting: Queue[Row | None] = Queue(MAX_WAITING)
        self._thread: Thread | None = None
        self._has_warned = False
        self._is_open = False
        self._sent: dict[str, int] = {}  # the last step of each kind that was sent

    def settings(self) -> dict[str, Any]:
        """The settings of the run for the service: without loggers, whose args may hold keys of another service, and
        without user names, passwords and queries in URIs."""
        from ray_dmml.filesystem import without_secrets  # imports pyarrow

        def shareable(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: shareable(each) for key, each in value.items()}
            if isinstance(value, list):
                return [shareable(each) for each in value]
            return without_secrets(value) if isinstance(value, str) else value

        settings: dict[str, Any] = shareable(self.config.model_dump(mode="json", exclude={"train": {"loggers"}}))
        return settings

    @abstractmethod
    def open(self, run_id: str | None) -> str:
        """Begins a run in the service, or goes on with the one that has this id. Returns its id."""

    @abstractmethod
    def send(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers of a step."""

    @abstractmethod
    def send_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Sends a picture, uint8 (H, W, 3)."""

    @abstractmethod
    def finish(self) -> None:
        """Ends the run in the service, if it was opened."""

    # --- the thread of the run --------------------------------------------------------------

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.is_finished |= "final" in metrics
        values, pictures = self._scalars.of(metrics), metrics.get("pictures", {})
        if pictures and self._waiting.qsize() >= MAX_WAITING_PICTURES:
            self._warn("does not answer")
            return
        if values or pictures:
            kind = next(key for key in ("validation", "final", "pictures", "images_per_second") if key in metrics)
            self._put((f"{kind} {' '.join(sorted(pictures))}".strip(), step, values, pictures))

    def rewind(self, step: int) -> None:
        self._scalars.rewind()
        if self._thread is None:  # from now on the folder is this run's
            self._thread = Thread(target=self._work, name=self.service, daemon=True)
            self._thread.start()

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._put(None)
        thread.join(self.close_s)
        if thread.is_alive():
            self._warn(f"has not answered for {self.close_s:.0f} s")

    def _put(self, row: Row | None) -> None:
        try:
            self._waiting.put_nowait(row)
        except Full:
            self._warn("does not answer")
            if row is None:
                while not self._waiting.empty():
                    try:
                        self._waiting.get_nowait()
                    except Empty:
                        break
                self._waiting.put_nowait(None)

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            logger.warning("%s %s; training goes on, and metrics.jsonl has what is missing there", self.service, what)
        self._has_warned = True

    # --- the thread of the service ----------------------------------------------------------

    def _work(self) -> None:
        while (row := self._waiting.get()) is not None:
            self._try(self._send, row)
        self._try(self.finish)

    def _try(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # each service has classes of its own
            self._warn(f"fails ({describe(error)})")

    def _send(self, row: Row) -> None:
        kind, step, values, pictures = row
        if not self._is_open:
            run_id, self._sent = _read(self._file)
            self._id = self.open(run_id)
            self._is_open = True
        if step <= self._sent.get(kind, -1):
            return
        if values:
            self.send(values, step)
        for name, picture in pictures.items():
            self.send_picture(name, picture, step)
        self._sent[kind] = step
        self._file.parent.mkdir(exist_ok=True)
        replace_file(self._file, json.dumps({"id": self._id, "sent": self._sent}))


def require_service(service: str, setting: str) -> None:
    """Raises UserError if the package of a service is not installed."""
    spec = find_spec(service)  # it is not imported, which would take seconds
    if spec is None or spec.origin is None:  # a folder of this name, such as one with the service's own files
        raise UserError(f"{setting}: {service} needs the extra: pip install 'ray-dmml[{service}]'")


def _read(file: Path) -> tuple[str | None, dict[str, int]]:
    """The id of the run in a service and the last steps that were sent; None and nothing if there is no such file."""
    try:
        content = json.loads(file.read_text())
        sent = {str(kind): int(step) for kind, step in content["sent"].items()}
        return (content["id"], sent) if re.fullmatch(r"[\w.-]{1,128}", content["id"]) else (None, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}
