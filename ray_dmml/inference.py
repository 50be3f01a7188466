"""Trained peers for use: a search service loads them from a run and embeds images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_dmml import pushed
from ray_dmml.checkpoint.peer_state import decode_peer
from ray_dmml.checkpoint.store import Checkpoint
from ray_dmml.config.code import Files as CodeFiles
from ray_dmml.config.code import code_in_use
from ray_dmml.config.parts import load_trusted_parts
from ray_dmml.config.schema import Config
from ray_dmml.cores import num_cores
from ray_dmml.data.augmentations import View, evaluation_view
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.decoding import Resize
from ray_dmml.data.image_files import files_of
from ray_dmml.data.loader import in_chunks
from ray_dmml.errors import UserError
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.models.embedding_net import EmbeddingNet, build_embedding_net
from ray_dmml.models.pretrained import load_net_weights
from ray_dmml.training.run_dir import RunDir

Files = Path | str | Iterable[Path | str]
"""A folder (its images in the order of :func:`~ray_dmml.data.image_files.list_images`), a file, or several files."""


class TrainedPeer:
    """One trained net in evaluation mode, with the evaluation view of its images.

    Images are decoded to squares of side S = ``decode_size``, in the way of ``resize``.

    Attributes:
        size: D, the number of dimensions of an embedding.
        preprocessing: what the net and the view do with a decoded image before the backbone gets it: ``input_size``,
            ``crop`` (the share of the side), ``mean`` and ``std`` (of pixels from 0 to 1).
    """

    def __init__(
        self,
        net: EmbeddingNet,
        view: View,
        decode_size: int,
        resize: Resize,
        architecture: Mapping[str, Any],
        preprocessing: Mapping[str, Any],
    ) -> None:
        self.net, self.view, self.size = net.eval(), view, net.embedding_size
        self.decode_size, self.resize = decode_size, resize
        self._architecture, self.preprocessing = architecture, preprocessing

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the embeddings depend on: the peer's name, its backbone and pooling, the preprocessing and
        the weights. Embeddings of other fingerprints must not be compared with these."""
        settings = {**self._architecture, **self.preprocessing}
        settings |= {"decode_size": self.decode_size, "resize": self.resize}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, weights in self.net.state_dict().items():
            digest.update(f"{name} {weights.dtype} {list(weights.shape)}".encode())
            digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def embed(self, images: Tensor) -> Tensor:
        """Embeds decoded images: uint8 (B, 3, S, S) -> (B, D) float32, rows of length 1."""
        with torch.no_grad():
            return self.net(self.view(images).to(next(self.net.parameters()).device))

    def embed_files(self, files: Files, batch_size: int = 64) -> np.ndarray:
        """Embeds image files, ``batch_size`` at a time: (N, D) float32, rows of length 1, in the files' order.

        Raises:
            UserError: a file cannot be read, which the message names, or a folder has no images.
        """
        batches = [self.embed(batch).cpu().numpy() for batch in _decoded(files, self, batch_size)]
        return np.concatenate([np.empty((0, self.size), np.float32), *batches])


class TrainedCohort:
    """The trained peers of a run by name. The cohort's embedding is the concatenation of theirs.

    Images are decoded to squares of side S = ``decode_size``, in the way of ``resize``.

    Attributes:
        peers: the trained peers by name, see :class:`TrainedPeer`.
        size: the number of dimensions of an embedding, the sum of the peers' D.
    """

    def __init__(self, peers: dict[str, TrainedPeer], decode_size: int, resize: Resize) -> None:
        self.peers, self.decode_size, self.resize = peers, decode_size, resize
        self.size = sum(peer.size for peer in peers.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the embeddings depend on: the peers' fingerprints in their order, and how their embeddings
        are put together."""
        parts = ["unit embeddings, concatenated and divided by the root of their number"]
        parts += [peer.fingerprint for peer in self.peers.values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def embed(self, images: Tensor) -> np.ndarray:
        """Embeds decoded images: uint8 (B, 3, S, S) -> (B, sum of D) float32, rows of length 1."""
        return ensemble_embedding([p.embed(images).cpu().numpy() for p in self.peers.values()])

    def embed_files(self, files: Files, batch_size: int = 64) -> np.ndarray:
        """Embeds image files, ``batch_size`` at a time: (N, sum of D) float32, rows of length 1, in the files' order.

        Raises:
            UserError: a file cannot be read, which the message names, or a folder has no images.
        """
        batches = [self.embed(batch) for batch in _decoded(files, self, batch_size)]
        return np.concatenate([np.empty((0, self.size), np.float32), *batches])


def _decoded(files: Files, like: TrainedPeer | TrainedCohort, batch_size: int) -> Iterator[Tensor]:
    """Batches of decoded files, uint8 (<= batch_size, 3, S, S). All cores decode ahead."""
    paths = [str(path.resolve()) for path in files_of(files)]
    source = FileImages(Path(), paths, like.decode_size, like.resize)
    return in_chunks(ImageSet(source, np.zeros(len(paths), np.int64), ("unknown",)), batch_size, num_cores())


def load_cohort(
    run: Path | str,
    weights: str | None = None,
    *,
    device: str = "cpu",
    trust_code: bool = False,
    revision: str | None = None,
) -> TrainedCohort:
    """Loads the trained peers of a run. It needs neither the run's images nor Ray.

    Args:
        run: the run's folder, a folder that ``ray-dmml push`` wrote, or ``hf-hub:OWNER/NAME`` on the Hugging Face hub,
            which is downloaded unless the hub's cache has it.
        weights: ``last``, ``best`` or ``ema`` (averaged weights of the last checkpoint; a peer without them uses
            its last weights). None takes the weights that the run's results are of.
        device: where the nets compute.
        trust_code: build own backbones that the run's config names.
        revision: branch, tag or commit of the repository on the hub; None: its main branch.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, it has an own backbone and ``trust_code`` is
            False, or the hub does not answer.
    """
    return read_peers(run, weights, trust_code=trust_code, revision=revision).build(device)


@dataclass(frozen=True)
class SavedPeers:
    """The peers of a run as they were saved. Other processes build the same nets of it, without the run's folder.

    Attributes:
        config: of the run.
        files: the weights of each peer that is built, as the content of a safetensors file.
        code: the Python files that an own backbone needs.
    """

    config: Config
    files: Mapping[str, bytes]
    code: CodeFiles

    def only(self, name: str) -> SavedPeers:
        """One peer alone. Raises UserError if there is none of this name."""
        if name not in self.files:
            raise UserError(f"the run has no peer {name!r}; its peers are {', '.join(self.files)}")
        return SavedPeers(self.config, {name: self.files[name]}, self.code)

    def build(self, device: str = "cpu") -> TrainedCohort:
        """The nets, on a device."""
        config, peers = self.config, {}
        for peer in (peer for peer in config.cohort.peers if peer.name in self.files):
            name = str(peer.name)
            net = build_embedding_net(peer, config.seed, initial_weights=False)
            load_net_weights(net, decode_peer({"weights.safetensors": self.files[name]})["net"], f"of {name}")
            crop = peer.eval_crop or net.eval_crop
            view = evaluation_view(net.input_size, crop, config.data.decode_size)
            architecture = {
                "name": name,
                "backbone": peer.backbone,
                "args": peer.backbone_args,
                "pooling": peer.pooling,
            }
            mean, std = _per_channel(net.mean), _per_channel(net.std)
            preprocessing = {"input_size": net.input_size, "crop": crop, "mean": mean, "std": std}
            layout = torch.channels_last if peer.channels_last else torch.contiguous_format  # as in training
            net.to(device).to(memory_format=layout)
            peers[name] = TrainedPeer(
                net, view, config.data.decode_size, config.data.resize, architecture, preprocessing
            )
        return TrainedCohort(peers, config.data.decode_size, config.data.resize)


def _per_channel(pixels: Tensor) -> list[float]:
    """(1, 3, 1, 1) of pixels from 0 to 255 -> 3 values of pixels from 0 to 1."""
    return [round(value / 255, 6) for value in pixels.flatten().tolist()]


def read_peers(
    run: Path | str, weights: str | None = None, *, trust_code: bool = False, revision: str | None = None
) -> SavedPeers:
    """Reads what :func:`load_cohort` builds. The arguments and errors are the same."""
    folder = RunDir.open(pushed.fetch(run, revision, code=trust_code))
    config = folder.config()
    load_trusted_parts(config, Path(run), trust_code, "trust_code=True", settings="backbone")
    which = config.weights_to_evaluate(weights)
    if pushed.is_pushed(folder.path):
        files = pushed.read_weights(folder.path, [str(peer.name) for peer in config.cohort.peers], which)
    else:
        files = weights_of(folder.checkpoints.load("best" if which == "best" else "last"), config, which)
    return SavedPeers(config, files, code_in_use() if trust_code else {})


def weights_of(checkpoint: Checkpoint, config: Config, which: str) -> dict[str, bytes]:
    """Each peer's file of its weights ``last``, ``best`` or ``ema``. Without ``ema``, a peer has its last ones."""
    files = {}
    for peer in config.cohort.peers:
        saved = checkpoint.peers[str(peer.name)]
        file = "ema.safetensors" if which == "ema" and "ema.safetensors" in saved else "weights.safetensors"
        files[str(peer.name)] = saved[file]
    return files
