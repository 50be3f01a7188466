"""Mistakes of a config that are seen before torch is imported and Ray is started, which takes seconds.

Paths are looked up. Names of backbones, losses and transforms are searched for in the text of the libraries that have
them. A name that is not there may still be right, so the part itself is then built, and raises its own error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ray_dmml.config.loading import BUILT_IN_WEIGHTS
from ray_dmml.config.parts import is_own
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.training.run_dir import RunDir

_OURS = {"DistanceWeightedNegativeMiner"}


def check_quickly(config: Config, *, on_this_machine: bool) -> None:
    """Checks what needs no process.

    Args:
        on_this_machine: the peers run here, and not on other nodes that have files of their own.

    Raises:
        UserError: a path does not exist, or a name is unknown.
    """
    data, peers = config.data, config.cohort.peers
    if data.source is None and data.name != "characters":
        may_download = data.name == "cub200" and data.download
        if data.root is not None and not data.root.is_dir() and not may_download:
            raise UserError(f"data.root {data.root} is not an existing folder")
        if data.name == "manifest" and data.manifest is not None and not data.manifest.is_file():
            raise UserError(f"data.manifest {data.manifest} is not an existing file")
    if config.train.init_from is not None:
        RunDir.open(config.train.init_from)
    for peer in peers:
        if on_this_machine and _is_path(peer.weights) and not Path(peer.weights).is_file():
            raise UserError(f"weights file {peer.weights} does not exist")
        if on_this_machine and peer.lora is not None and find_spec("peft") is None:
            raise UserError(f"{peer.name}: lora needs the extra: pip install 'ray-dmml[lora]'")
    unknown = set(_backbones(peers)) - _words("timm", "models/*.py", set(_backbones(peers)))
    for peer in peers:
        if peer.backbone.partition(".")[0] in unknown:
            from ray_dmml.models.embedding_net import EmbeddingNet

            EmbeddingNet(peer)
    names = {transform.name for peer in peers if not isinstance(peer.view, str) for transform in peer.view}
    transforms = {name for name in names if not is_own(name)}
    if unknown := transforms - _words("torchvision", "transforms/v2/__init__.py", transforms):
        from ray_dmml.data.augmentations import training_view

        for peer in peers:
            if not isinstance(peer.view, str) and unknown & {transform.name for transform in peer.view}:
                training_view(peer.view, peer.input_size or 224, data.decode_size, str(peer.name))
    loss = config.loss.metric
    parts = {loss.name, *([loss.miner.name] if loss.miner else []), *([loss.reducer] if loss.reducer else [])}
    # Own parts are imported later, when their files are known.
    if not any(map(is_own, parts)) and parts - _words("pytorch_metric_learning", "*/__init__.py", parts) - _OURS:
        from ray_dmml.losses.metric import MetricLoss

        MetricLoss(loss, data.classes_per_batch, peers[0].embedding_size)


def _is_path(weights: str) -> bool:
    return weights not in BUILT_IN_WEIGHTS and ":" not in weights


def _backbones(peers: tuple[PeerConfig, ...]) -> Iterator[str]:
    """Names without their tags; not those of a hub, a folder or a class of the user's."""
    for peer in peers:
        if not {":", "/"} & set(peer.backbone) and not is_own(peer.backbone):
            yield peer.backbone.partition(".")[0]


def _words(package: str, files: str, words: set[str]) -> set[str]:
    """Those of the words that occur in files of a package, which is not imported. All if it has no files."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    texts = [file.read_text(errors="replace") for folder in folders or () for file in sorted(Path(folder).glob(files))]
    return {word for word in words if not texts or any(re.search(rf"\b{re.escape(word)}\b", text) for text in texts)}
