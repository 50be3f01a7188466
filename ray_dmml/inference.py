"""Trained peers for use: a search service loads them from a run and embeds images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ray_dmml.config.parts import load_trusted_parts
from ray_dmml.cores import num_cores
from ray_dmml.data.augmentations import View, evaluation_view
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.decoding import Resize
from ray_dmml.data.image_files import files_of
from ray_dmml.data.loader import in_chunks
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.models.embedding_net import EmbeddingNet, build_embedding_net
from ray_dmml.models.pretrained import load_net_weights
from ray_dmml.training.run_dir import RunDir

Files = Path | str | Iterable[Path | str]
"""A folder (its images in the order of :func:`~ray_dmml.data.image_files.list_images`), a file, or several files."""


class TrainedPeer:
    """One trained net in evaluation mode, with the evaluation view of its images.

    Images are decoded to squares of side S = ``decode_size``, in the way of ``resize``.
    """

    def __init__(self, net: EmbeddingNet, view: View, decode_size: int, resize: Resize) -> None:
        self.net, self.view = net.eval(), view
        self.decode_size, self.resize = decode_size, resize

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the view."""
        content = hashlib.sha256(f"{self.decode_size} {self.resize} {self.view.pipeline}".encode())
        for name, tensor in self.net.state_dict().items():
            content.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()

    def embed(self, images: Tensor) -> Tensor:
        """Embeds decoded images: uint8 (B, 3, S, S) -> (B, D) float32, rows of length 1."""
        with torch.no_grad():
            return self.net(self.view(images).to(next(self.net.parameters()).device))

    def embed_files(self, files: Files, batch_size: int = 64) -> np.ndarray:
        """Embeds image files, ``batch_size`` at a time: (N, D) float32, rows of length 1, in the files' order.

        Raises UserError with the name of a file that cannot be read, and if a folder has no images.
        """
        batches = [self.embed(batch).cpu().numpy() for batch in _decoded(files, self, batch_size)]
        return np.concatenate([np.empty((0, self.net.embedding_size), np.float32), *batches])


class TrainedCohort:
    """The trained peers of a run by name. The cohort's embedding is the concatenation of theirs.

    Images are decoded to squares of side S = ``decode_size``, in the way of ``resize``.
    """

    def __init__(self, peers: dict[str, TrainedPeer], decode_size: int, resize: Resize) -> None:
        self.peers, self.decode_size, self.resize = peers, decode_size, resize

    @property
    def fingerprint(self) -> str:
        """SHA-256 of those of the peers."""
        return hashlib.sha256(" ".join(peer.fingerprint for peer in self.peers.values()).encode()).hexdigest()

    def embed(self, images: Tensor) -> np.ndarray:
        """Embeds decoded images: uint8 (B, 3, S, S) -> (B, sum of D) float32, rows of length 1."""
        return ensemble_embedding([p.embed(images).cpu().numpy() for p in self.peers.values()])

    def embed_files(self, files: Files, batch_size: int = 64) -> np.ndarray:
        """Embeds image files, ``batch_size`` at a time: (N, sum of D) float32, rows of length 1, in the files' order.

        Raises UserError with the name of a file that cannot be read, and if a folder has no images.
        """
        size = sum(peer.net.embedding_size for peer in self.peers.values())
        batches = [self.embed(batch) for batch in _decoded(files, self, batch_size)]
        return np.concatenate([np.empty((0, size), np.float32), *batches])


def _decoded(files: Files, like: TrainedPeer | TrainedCohort, batch_size: int) -> Iterator[Tensor]:
    """Batches of decoded files, uint8 (<= batch_size, 3, S, S). All cores decode ahead."""
    paths = [str(path.resolve()) for path in files_of(files)]
    source = FileImages(Path(), paths, like.decode_size, like.resize)
    return in_chunks(ImageSet(source, np.zeros(len(paths), np.int64), ("unknown",)), batch_size, num_cores())


def load_cohort(
    run: Path | str, weights: str | None = None, *, device: str = "cpu", trust_code: bool = False
) -> TrainedCohort:
    """Loads the trained peers of a run. It needs neither the run's images nor Ray.

    Args:
        run: the run's folder.
        weights: ``last``, ``best`` or ``ema`` (averaged weights of the last checkpoint; a peer without them uses
            its last weights). None takes the weights that the run's results are of.
        device: where the nets compute.
        trust_code: build own backbones that the run's config names.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it has an own backbone and ``trust_code`` is
            False.
    """
    folder = RunDir.open(run)
    config = folder.config()
    load_trusted_parts(config, folder.path, trust_code, "trust_code=True", settings="backbone")
    which = config.weights_to_evaluate(weights)
    checkpoint = folder.checkpoints.load("best" if which == "best" else "last")
    peers = {}
    for peer in config.cohort.peers:
        files = checkpoint.peers[str(peer.name)]
        file = "ema.safetensors" if which == "ema" and "ema.safetensors" in files else "weights.safetensors"
        net = build_embedding_net(peer, config.seed, initial_weights=False)
        load_net_weights(net, safetensors.torch.load(files[file]), f"of {peer.name}")
        view = evaluation_view(net.input_size, peer.eval_crop or net.eval_crop, config.data.decode_size)
        layout = torch.channels_last if peer.channels_last else torch.contiguous_format  # as in training
        net.to(device).to(memory_format=layout)
        peers[str(peer.name)] = TrainedPeer(net, view, config.data.decode_size, config.data.resize)
    return TrainedCohort(peers, config.data.decode_size, config.data.resize)
