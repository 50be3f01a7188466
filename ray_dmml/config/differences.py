"""In which settings configs differ, and which settings change no number of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ray_dmml.config.loading import dotted

WHERE_THINGS_ARE = ("code*", "data.root", "data.source", "data.manifest", "data.cache_gib", "data.cache_dir")
"""Places of files."""

CHANGES_NO_TRAINING = (
    *WHERE_THINGS_ARE,
    *("train.log_every", "train.tensorboard", "train.pictures", "train.report", "train.loggers*"),
    *("checkpoint.*", "failure.*", "data.on_bad_image", "data.check_images"),
    *("cohort.transport", "cohort.placement_strategy", "cohort.*_timeout_s", "cohort.threads_per_peer"),
    *("cohort.peers.*.resources*", "cohort.peers.*.labels*", "cohort.peers.*.num_gpus", "cohort.peers.*.num_cpus"),
    *("cohort.peers.*.replicas", "cohort.peers.*.num_workers", "cohort.peers.*.checkpoint_activations"),
)
"""Settings after which the same weights are trained, up to the last bits of floating-point sums."""


def settings_without(settings: Mapping[str, Any], patterns: Collection[str]) -> dict[str, Any]:
    """Settings by dotted keys, without those that match a pattern, such as ``checkpoint.*``."""
    return {
        key: value
        for key, value in dotted(settings).items()
        if not any(fnmatchcase(key, pattern) for pattern in patterns)
    }


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not all equal, with the value in each of several settings by dotted keys; None where
    one lacks the key."""
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: of for key, of in values.items() if any(value != of[0] for value in of)}
