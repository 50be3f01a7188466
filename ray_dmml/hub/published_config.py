"""The config of a run as it is published: how the nets were trained, and nothing about the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ray_dmml.config.loading import BUILT_IN_WEIGHTS
from ray_dmml.config.schema import DATA_SETS, Config

NOT_PUBLISHED = "not-published"
"""In place of a path that the config must have."""

_PATH = re.compile(r"[/~]|\\\\|[A-Za-z]:[\\/]|.*://", re.DOTALL)
"""What a path or URI begins with."""


def published_config(config: Config, weights: str, code: Sequence[str]) -> Config:
    """The config without paths, URIs, loggers, and names and resources of nodes.

    Args:
        config: that of the run.
        weights: the weights that are published, for ``evaluation.weights``.
        code: Python files and folders that are published, relative to the config.
    """
    raw = config.model_dump(mode="json")
    raw["code"] = list(code)
    data, train = raw["data"], raw["train"]
    is_of_files = config.data.name in DATA_SETS[1:]
    data["root"] = NOT_PUBLISHED if is_of_files else None
    data["manifest"] = NOT_PUBLISHED if config.data.manifest else None
    data |= {"source": None, "args": {}, "cache_dir": None}
    train["init_from"] = NOT_PUBLISHED if config.train.init_from else None
    train["loggers"] = []
    raw["checkpoint"]["storage_path"] = None
    raw["evaluation"]["weights"] = weights
    for peer in raw["cohort"]["peers"]:
        if peer["weights"] not in BUILT_IN_WEIGHTS:
            peer["weights"] = NOT_PUBLISHED
        peer |= {"labels": {}, "resources": {}}
    return Config.parse(_without_paths(raw), source="the published config")


def _without_paths(value: Any) -> Any:
    """null in place of each text that is an absolute path or a URI, such as in ``args``."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return None if isinstance(value, str) and _PATH.match(value) else value
