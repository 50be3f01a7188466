"""A pushed cohort: the folder that ``ray-dmml push`` writes, on this machine or on the Hugging Face hub.

README.md                   the model card
config.yaml                 the run's config without paths of the machine that it was trained on
pushed.json                 the peers' files with sizes and SHA-256, which weights they are, digests of the images
results.json                the results of the run
PEER/weights.safetensors    the evaluated weights of each peer
code/                       the Python files of the config's ``code``, if they were pushed
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray_dmml.config.parts import describe
from ray_dmml.errors import UserError
from ray_dmml.models.backbone import HUB

FACTS_FILE, WEIGHTS_FILE, CODE_FOLDER = "pushed.json", "weights.safetensors", "code"

FILES = ("README.md", "config.yaml", FACTS_FILE, "results.json", f"*/{WEIGHTS_FILE}")
"""Patterns of the files that are downloaded."""


def is_pushed(folder: Path) -> bool:
    """Whether the folder is a pushed cohort."""
    return (folder / FACTS_FILE).is_file()


def repository(name: str) -> str:
    """``OWNER/NAME`` of a repository of the hub, given with or without ``hf-hub:``. Raises UserError if it is not."""
    repo = name.removeprefix(HUB)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII):
        raise UserError(f"{name!r} is not a repository of the Hugging Face hub: write OWNER/NAME")
    return repo


def fetch(place: Path | str, revision: str | None = None, *, code: bool = False) -> Path:
    """The folder of a run or of a pushed cohort.

    Args:
        place: the folder, or ``hf-hub:OWNER/NAME``, which is downloaded unless the hub's cache has it.
        revision: branch, tag or commit of a repository; None: its main branch.
        code: download its Python files, too. Nothing else is downloaded but :data:`FILES`.

    Raises:
        UserError: the hub does not answer or has no such repository, or it is not a pushed cohort.
    """
    if not str(place).startswith(HUB):
        if revision is not None:
            raise UserError(f"a revision is that of a repository ({HUB}OWNER/NAME), and {place} is a folder")
        return Path(place)
    from huggingface_hub import snapshot_download

    patterns = [*FILES, *([f"{CODE_FOLDER}/*.py"] if code else [])]
    repo = repository(str(place))
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many types
        raise UserError(f"{place} could not be read from the Hugging Face hub ({reason(error)})") from None
    if not is_pushed(folder):
        raise UserError(f"{place} is not a cohort that ray-dmml push wrote: it has no {FACTS_FILE}")
    return folder


def read_weights(folder: Path, peers: Iterable[str], which: str) -> dict[str, bytes]:
    """The content of each peer's weights.safetensors.

    Args:
        which: ``last``, ``best`` or ``ema``.

    Raises:
        UserError: it has other weights, or a file is missing or damaged.
    """
    facts = _read_facts(folder)
    if facts["weights"] != which:
        raise UserError(f"{folder} has no weights {which!r}; it has the evaluated ones only, {facts['weights']!r}")
    return {peer: _read_verified(folder / peer / WEIGHTS_FILE, facts["peers"].get(peer)) for peer in peers}


def step(folder: Path) -> int:
    """The step that the weights are of. Raises UserError if pushed.json is damaged."""
    return _read_facts(folder)["step"]


def reason(error: BaseException) -> str:
    """Why the hub's client failed, in one line."""
    answer = (getattr(error, "server_message", None) or "").strip().splitlines()
    return f"{type(error).__name__}: {answer[0]}" if answer else describe(error)


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(facts["weights"], str) and isinstance(facts["peers"], dict)):
            raise ValueError("weights or peers are of another type")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {describe(error)}") from None
    return facts


def _read_verified(path: Path, written: Any) -> bytes:
    """The content of a file; ``written`` are its ``size`` and ``sha256`` according to pushed.json."""
    problem = "pushed.json has no size and SHA-256 of it"
    if isinstance(written, dict) and {"size", "sha256"} <= written.keys():
        try:
            status = path.stat()  # the hub's cache consists of links
            if not stat.S_ISREG(status.st_mode):
                problem = "it is not a file"
            elif status.st_size != written["size"]:
                problem = f"it has {status.st_size} bytes, and {written['size']} were written"
            else:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == written["sha256"]:
                    return content
                problem = "its content does not match its checksum"
        except OSError as error:
            problem = str(error.strerror)
    raise UserError(f"{path} cannot be used: {problem}")
