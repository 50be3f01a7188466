"""Trained peers for use: a search service loads them from a run and embeds images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ray_dmml.data.augmentations import View, evaluation_view
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.decoding import Resize
from ray_dmml.data.loader import in_chunks
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.models.embedding_net import EmbeddingNet, build_embedding_net
from ray_dmml.models.pretrained import load_net_weights
from ray_dmml.training.run_dir import RunDir


class TrainedPeer:
    """One trained net in evaluation mode, with the evaluation view of its images."""

    def __init__(self, net: EmbeddingNet, view: View) -> None:
        self.net, self.view = net.eval(), view

    def embed(self, images: Tensor) -> Tensor:
        """Embeds decoded images: uint8 (B, 3, S, S) -> (B, D) float32, rows of length 1."""
        with torch.no_grad():
            return self.net(self.view(images).to(next(self.net.parameters()).device))


class TrainedCohort:
    """The trained peers of a run by name. The cohort's embedding is the concatenation of theirs.

    Images are decoded to squares of side S = ``decode_size``, in the way of ``resize``.
    """

    def __init__(self, peers: dict[str, TrainedPeer], decode_size: int, resize: Resize) -> None:
        self.peers, self.decode_size, self.resize = peers, decode_size, resize

    def embed(self, images: Tensor) -> np.ndarray:
        """Embeds decoded images: uint8 (B, 3, S, S) -> (B, sum of D) float32, rows of length 1."""
        return ensemble_embedding([p.embed(images).cpu().numpy() for p in self.peers.values()])

    def embed_files(self, paths: Iterable[Path | str], batch_size: int = 64) -> np.ndarray:
        """Embeds image files, ``batch_size`` at a time: (N, sum of D) float32, rows of length 1, in their order.

        Raises UserError with the name of a file that cannot be read.
        """
        files = [str(Path(path).resolve()) for path in paths]
        source = FileImages(Path(), files, self.decode_size, self.resize)
        images = ImageSet(source, np.zeros(len(files), np.int64), ("unknown",))
        size = sum(peer.net.embedding_size for peer in self.peers.values())
        batches = [self.embed(batch) for batch in in_chunks(images, batch_size)]
        return np.concatenate([np.empty((0, size), np.float32), *batches])


def load_cohort(run: Path | str, weights: str | None = None, *, device: str = "cpu") -> TrainedCohort:
    """Loads the trained peers of a run. It needs neither the run's images nor Ray.

    Args:
        run: the run's folder.
        weights: ``last``, ``best`` or ``ema`` (averaged weights of the last checkpoint; a peer without them uses
            its last weights). None takes the weights that the run's results are of.
        device: where the nets compute.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    folder = RunDir.open(run)
    config = folder.config()
    which = config.weights_to_evaluate(weights)
    checkpoint = folder.checkpoints.load("best" if which == "best" else "last")
    peers = {}
    for peer in config.cohort.peers:
        files = checkpoint.peers[str(peer.name)]
        file = "ema.safetensors" if which == "ema" and "ema.safetensors" in files else "weights.safetensors"
        net = build_embedding_net(peer, config.seed, initial_weights=False)
        load_net_weights(net, safetensors.torch.load(files[file]), f"of {peer.name}")
        view = evaluation_view(net.input_size, peer.eval_crop or net.eval_crop, config.data.decode_size)
        peers[str(peer.name)] = TrainedPeer(net.to(device), view)
    return TrainedCohort(peers, config.data.decode_size, config.data.resize)
