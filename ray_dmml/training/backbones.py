"""The frozen backbones of a run: what the initial weights retrieve without any training, and whether a peer ended
below that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray_dmml.cohort.cohort import Cohort
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.data.dataset import ImageSet
from ray_dmml.evaluation.evaluation import evaluate_vectors


def evaluate_backbones(cohort: Cohort, config: Config, split: str, images: ImageSet) -> dict[str, dict[str, float]]:
    """Figures of the backbone of each peer that learns, by the peer's name: its pooled features at unit length, before
    the head. Peers that start with the same backbone share one evaluation."""
    first_with: dict[tuple[Any, ...], str] = {}
    same_as = {
        str(peer.name): first_with.setdefault(_initial_backbone(config, peer), str(peer.name))
        for peer in config.cohort.peers
        if peer.name in cohort.names and not peer.frozen
    }
    features = cohort.features(split, set(same_as.values()))
    figures = {
        name: evaluate_vectors(vectors, images, config.evaluation.recall_at) for name, vectors in features.items()
    }
    return {name: figures[first] for name, first in same_as.items()}


def _initial_backbone(config: Config, peer: PeerConfig) -> tuple[Any, ...]:
    """What the features of a peer's initial backbone depend on."""
    source = (config.train.init_from and peer.name) or peer.weights
    seed = peer.init_seed if peer.weights == "none" else None
    net = (peer.backbone, str(peer.backbone_args), peer.pooling, peer.input_size, peer.eval_crop, peer.amp)
    return (source, seed, *net)


def warn_of_harm(config: Config, results: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each peer whose training made its pretrained backbone worse on the evaluated classes."""
    for peer in config.cohort.peers:
        name = str(peer.name)
        if name not in results["peers"] or name not in results["frozen_backbones"]:
            continue
        after, before = (results[key][name]["recall@1"] for key in ("peers", "frozen_backbones"))
        if after < before and (peer.weights != "none" or config.train.init_from):
            yield (
                f"{name} ends below its frozen backbone: Recall@1 is {100 * after:.1f} % and was {100 * before:.1f} % "
                "before training, without the head; try a lower optimizer.lr, optimizer.layer_decay, or freeze_blocks"
            )
