"""ray-dmml: diversified mutual learning for deep metric learning, on Ray.

Park, Kim, You, Cho, *Diversified Mutual Learning for Deep Metric Learning* (DM2), ECCV 2020 Workshops,
https://arxiv.org/abs/2009.04170

    from ray_dmml import Config, train, evaluate, load_cohort

Names are imported at their first use, so that the coordinator's process loads no torch, and most modules no Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_dmml.config.schema import Config
    from ray_dmml.data.dataset import FileImages, ImageSet
    from ray_dmml.data.image_files import list_images
    from ray_dmml.data.sampler import ClassBalancedSampler
    from ray_dmml.errors import UserError
    from ray_dmml.inference import TrainedCohort, load_cohort
    from ray_dmml.loggers.logger import Logger
    from ray_dmml.losses.relational import relational_losses
    from ray_dmml.losses.relaxed_contrastive import relaxed_contrastive_loss
    from ray_dmml.losses.similarity import similarity_loss
    from ray_dmml.training.distill import distill
    from ray_dmml.training.evaluate import evaluate
    from ray_dmml.training.run import train

__all__ = [
    "ClassBalancedSampler",
    "Config",
    "FileImages",
    "ImageSet",
    "Logger",
    "TrainedCohort",
    "UserError",
    "distill",
    "evaluate",
    "list_images",
    "load_cohort",
    "relational_losses",
    "relaxed_contrastive_loss",
    "similarity_loss",
    "train",
]

_HOMES = {
    "ClassBalancedSampler": "ray_dmml.data.sampler",
    "Config": "ray_dmml.config.schema",
    "FileImages": "ray_dmml.data.dataset",
    "ImageSet": "ray_dmml.data.dataset",
    "Logger": "ray_dmml.loggers.logger",
    "UserError": "ray_dmml.errors",
    "list_images": "ray_dmml.data.image_files",
    "relational_losses": "ray_dmml.losses.relational",
    "relaxed_contrastive_loss": "ray_dmml.losses.relaxed_contrastive",
    "similarity_loss": "ray_dmml.losses.similarity",
    "TrainedCohort": "ray_dmml.inference",
    "load_cohort": "ray_dmml.inference",
    "distill": "ray_dmml.training.distill",
    "evaluate": "ray_dmml.training.evaluate",
    "train": "ray_dmml.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_dmml' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
