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
    from ray_dmml.data.datasets import load_splits
    from ray_dmml.data.image_files import list_images
    from ray_dmml.data.sampler import ClassBalancedSampler
    from ray_dmml.embedding.embed import embed
    from ray_dmml.errors import UserError
    from ray_dmml.exporting.export import export
    from ray_dmml.hub.push import push
    from ray_dmml.index.build import build_index, remove_rows, update_index
    from ray_dmml.index.image_index import ImageIndex, load_index
    from ray_dmml.inference import TrainedCohort, load_cohort
    from ray_dmml.loggers.logger import Logger
    from ray_dmml.losses.distance_weighted import DistanceWeightedNegativeMiner
    from ray_dmml.losses.relational import relational_losses
    from ray_dmml.losses.relaxed_contrastive import relaxed_contrastive_loss
    from ray_dmml.losses.similarity import similarity_loss
    from ray_dmml.randomness import seeded
    from ray_dmml.training.compare import compare
    from ray_dmml.training.distill import distill
    from ray_dmml.training.evaluate import evaluate
    from ray_dmml.training.neighbors import draw_neighbors
    from ray_dmml.training.report import write_report
    from ray_dmml.training.run import train

__all__ = [
    "ClassBalancedSampler",
    "Config",
    "DistanceWeightedNegativeMiner",
    "FileImages",
    "ImageIndex",
    "ImageSet",
    "Logger",
    "TrainedCohort",
    "UserError",
    "build_index",
    "compare",
    "distill",
    "draw_neighbors",
    "embed",
    "evaluate",
    "export",
    "list_images",
    "load_cohort",
    "load_index",
    "load_splits",
    "push",
    "relational_losses",
    "relaxed_contrastive_loss",
    "remove_rows",
    "seeded",
    "similarity_loss",
    "train",
    "update_index",
    "write_report",
]

_HOMES = {
    "ClassBalancedSampler": "ray_dmml.data.sampler",
    "Config": "ray_dmml.config.schema",
    "DistanceWeightedNegativeMiner": "ray_dmml.losses.distance_weighted",
    "FileImages": "ray_dmml.data.dataset",
    "ImageIndex": "ray_dmml.index.image_index",
    "ImageSet": "ray_dmml.data.dataset",
    "Logger": "ray_dmml.loggers.logger",
    "TrainedCohort": "ray_dmml.inference",
    "UserError": "ray_dmml.errors",
    "build_index": "ray_dmml.index.build",
    "compare": "ray_dmml.training.compare",
    "distill": "ray_dmml.training.distill",
    "draw_neighbors": "ray_dmml.training.neighbors",
    "embed": "ray_dmml.embedding.embed",
    "evaluate": "ray_dmml.training.evaluate",
    "export": "ray_dmml.exporting.export",
    "list_images": "ray_dmml.data.image_files",
    "load_cohort": "ray_dmml.inference",
    "load_index": "ray_dmml.index.image_index",
    "load_splits": "ray_dmml.data.datasets",
    "push": "ray_dmml.hub.push",
    "relational_losses": "ray_dmml.losses.relational",
    "relaxed_contrastive_loss": "ray_dmml.losses.relaxed_contrastive",
    "remove_rows": "ray_dmml.index.build",
    "seeded": "ray_dmml.randomness",
    "similarity_loss": "ray_dmml.losses.similarity",
    "train": "ray_dmml.training.run",
    "update_index": "ray_dmml.index.build",
    "write_report": "ray_dmml.training.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_dmml' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
