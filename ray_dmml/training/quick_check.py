"""Mistakes of a config that are seen before torch is imported and Ray is started, each of which takes seconds.

Paths are looked up. Names of backbones, losses and transforms are searched for in the text of the libraries that have
them. What else may be wrong with a part is seen when it is built.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ray_dmml.config.loading import BUILT_IN_WEIGHTS
from ray_dmml.config.parts import is_own, load_parts
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.loggers.build import check_services
from ray_dmml.training.run_dir import RunDir


def check_quickly(config: Config, *, on_this_machine: bool, reads_weights: bool = True) -> None:
    """Checks what needs no process.

    Args:
        on_this_machine: the peers run here, and not on other nodes that have files of their own.
        reads_weights: the run begins with its initial weights, and not with a checkpoint.

    Raises:
        UserError: a path does not exist, a name is unknown, an own part cannot be found, or the package of a logger is
            missing.
    """
    _check_images(config)
    if reads_weights:
        _check_weights(config, on_this_machine)
    _check_adapters(config, on_this_machine)
    loss = config.loss.metric
    for peer in config.cohort.peers:
        if not is_own(peer.backbone):
            message = f"unknown backbone {peer.backbone!r}: it must be a timm model name"
            _require(peer.backbone.partition(".")[0], message, "timm", "models/*.py", r"@register_model\s+def (\w+)")
        for transform in () if isinstance(peer.view, str) else peer.view:
            message = f"view of {peer.name}: unknown transform {transform.name!r}"
            _require(transform.name, message, "torchvision", "transforms/v2/__init__.py")
    _require_loss_part(loss.name, "loss", "loss.metric")
    if loss.miner is not None and loss.miner.name != "DistanceWeightedNegativeMiner":
        _require_loss_part(loss.miner.name, "miner", "loss.metric.miner")
    if loss.reducer is not None:
        _require_loss_part(loss.reducer, "reducer", "loss.metric.reducer")
    check_services(config)
    load_parts(config)  # imports nothing but own parts


def _check_images(config: Config) -> None:
    data = config.data
    if data.source is None and data.name != "characters":
        may_download = data.name == "cub200" and data.download
        if data.root is not None and not os.path.isdir(data.root) and not may_download:
            raise UserError(f"data.root {data.root} is not an existing folder")
        if data.name == "manifest" and data.manifest is not None and not os.path.isfile(data.manifest):
            raise UserError(f"data.manifest {data.manifest} is not an existing file")


def _check_weights(config: Config, on_this_machine: bool) -> None:
    if config.train.init_from is not None:
        RunDir.open(config.train.init_from)
    elif on_this_machine:
        for peer in config.cohort.peers:
            if peer.weights not in BUILT_IN_WEIGHTS and not os.path.isfile(peer.weights):
                raise UserError(f"weights file {peer.weights} does not exist")


def _check_adapters(config: Config, on_this_machine: bool) -> None:
    for peer in config.cohort.peers:
        if on_this_machine and peer.lora is not None and find_spec("peft") is None:
            raise UserError(f"{peer.name}: lora needs the extra: pip install 'ray-dmml[lora]'")


def _require_loss_part(name: str, kind: str, where: str) -> None:
    folder = {"loss": "losses"}.get(kind, f"{kind}s")
    _require(name, f"{where}: there is no {kind} {name!r}", "pytorch_metric_learning", f"{folder}/__init__.py")


def _require(name: str, message: str, package: str, files: str, definition: str = r"\b([A-Z]\w+)\b") -> None:
    """Raises UserError with the message and the nearest names if no such file of a package contains the name.

    Names of hubs, folders and own parts are none of the package's. A package that is not installed is not searched.
    """
    if {":", "/"} & set(name) or is_own(name):
        return
    text = _text(package, files)
    word = re.escape(name)  # first in the pattern, with which the search takes milliseconds
    if text and not re.search(rf"{word}(?<!\w{word})\b", text):
        near = difflib.get_close_matches(name, set(re.findall(definition, text)), n=3, cutoff=0.5)
        raise UserError(f"{message}; " + (f"did you mean {', '.join(near)}?" if near else f"see {package}"))


@cache
def _text(package: str, files: str) -> str:
    """The text of files of a package, which is not imported."""
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    paths = [path for folder in folders for path in sorted(Path(folder).glob(files))]
    return "\n".join(path.read_text(errors="replace") for path in paths)
