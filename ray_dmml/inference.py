"""Trained peers, ready to embed images: what a search service takes from a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ray_dmml.config.schema import PeerConfig
from ray_dmml.data.augmentations import View, evaluation_view
from ray_dmml.data.dataset import FileImages
from ray_dmml.data.decoding import Resize
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.models.embedding_net import EmbeddingNet, load_net_weights
from ray_dmml.training.run_dir import RunDir


class TrainedPeer:
    """One trained net with the view it is to be given.

    Attributes:
        net: :class:`~ray_dmml.models.embedding_net.EmbeddingNet` in evaluation mode.
        view: uint8 (B, 3, S, S) -> uint8 (B, 3, H, H).
    """

    def __init__(self, net: EmbeddingNet, view: View) -> None:
        self.net, self.view = net.eval(), view

    def embed(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S), decoded as the run decodes -> (B, D) float32, unit length."""
        with torch.no_grad():
            return self.net(self.view(images).to(next(self.net.parameters()).device))


class TrainedCohort:
    """The peers of a run; together they embed by concatenation.

    Attributes:
        peers: name to :class:`TrainedPeer`, in peer order.
        decode_size: S.
    """

    def __init__(self, peers: dict[str, TrainedPeer], decode_size: int, resize: Resize) -> None:
        self.peers, self.decode_size, self._aspect = peers, decode_size, resize

    def embed(self, images: Tensor) -> np.ndarray:
        """uint8 (B, 3, S, S) -> the ensemble's (B, sum of D) float32, unit length."""
        return ensemble_embedding([p.embed(images).cpu().numpy() for p in self.peers.values()])

    def embed_files(self, paths: Iterable[Path | str], batch_size: int = 64) -> np.ndarray:
        """Image files -> the ensemble's (N, sum of D) float32.

        Raises:
            UserError: a file cannot be read; it is named.
        """
        files = [str(Path(path).resolve()) for path in paths]
        source = FileImages(Path(), files, self.decode_size, self._aspect)
        chunks = [
            self.embed(torch.stack([source.read(i) for i in chunk]))
            for chunk in _chunks(range(len(files)), batch_size)
        ]
        size = sum(peer.net.embedding_size for peer in self.peers.values())
        return np.concatenate(chunks) if chunks else np.zeros((0, size), np.float32)


def load_cohort(
    run: Path | str, weights: str | None = None, *, device: str = "cpu"
) -> TrainedCohort:
    """The peers of a run, for inference; neither its images nor Ray are needed.

    Args:
        run: its folder.
        weights: ``last``, ``best`` or ``ema`` (of the last, where a peer keeps them); None:
            those the run was judged by.
        device: where the nets go.

    Raises:
        UserError: no such run or checkpoint.
    """
    folder = RunDir.open(run)
    config = folder.config()
    which = config.weights_to_judge(weights)
    checkpoint = folder.checkpoints.load("best" if which == "best" else "last")
    peers = {}
    for peer in config.cohort.peers:
        files = checkpoint.peers[str(peer.name)]
        averaged = which == "ema" and "ema.safetensors" in files
        content = files["ema.safetensors" if averaged else "weights.safetensors"]
        net = _plain_net(peer)
        load_net_weights(net, safetensors.torch.load(content), f"of {peer.name}")
        crop = peer.eval_crop if peer.eval_crop is not None else net.eval_crop
        view = evaluation_view(net.input_size, crop, config.data.decode_size)
        peers[str(peer.name)] = TrainedPeer(net.to(device), view)
    return TrainedCohort(peers, config.data.decode_size, config.data.resize)


def _plain_net(peer: PeerConfig) -> EmbeddingNet:
    return EmbeddingNet(
        peer.backbone, peer.embedding_size, peer.pooling, peer.batch_norm, peer.input_size
    )


def _chunks(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]
