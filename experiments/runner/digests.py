"""Digests of what the figures of a row depend on, besides seed and code."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits

NO_EFFECT: Any = {
    "checkpoint": True,
    "failure": True,
    "data": {"root", "source", "manifest", "cache_dir", "cache_gib", "check_images"},
}
"""Settings that no figure depends on. The images have a digest of their own."""


def digest(content: Any) -> str:
    """Of JSON data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_images(data: DataConfig) -> tuple[Splits, str]:
    """All images, before a fold is held out, and their digest. They are decoded and checked here, once."""
    splits = load_splits(data.model_copy(update={"validation_fraction": 0.0}))
    return splits, digest(splits.digests())
