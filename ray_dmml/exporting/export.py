"""``export``: trained peers as a file that runs without this package."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from ray_dmml.atomic_files import wait_for_disk
from ray_dmml.config.parts import load_trusted_parts
from ray_dmml.data.center_view import CenterView
from ray_dmml.errors import UserError
from ray_dmml.exporting.embedder import Embedder, traced
from ray_dmml.exporting.onnx_file import load_onnx, require_onnx, write_onnx
from ray_dmml.exporting.parity import Parity, compare
from ray_dmml.exporting.torch_file import load_torch, write_torch
from ray_dmml.inference import TrainedCohort, TrainedPeer, load_cohort
from ray_dmml.training.evaluate import images_to_evaluate
from ray_dmml.training.image_list import ImageList
from ray_dmml.training.run_dir import RunDir, versions_of

FORMATS, PRECISIONS = ("onnx", "torch"), ("fp32", "fp16", "int8")

logger = logging.getLogger(__name__)

ENSEMBLE = "ensemble"
"""In the place of a peer's name: all peers together."""

MAX_DIFFERENCE, MAX_RECALL_DIFFERENCE = 1e-4, 0.002
"""What a file may differ by from PyTorch: the embeddings in fp32, Recall@1 in fp16 and int8."""


def export(
    run: Path | str,
    out: Path | str,
    *,
    peer: str = ENSEMBLE,
    format: str = "onnx",
    precision: str = "fp32",
    weights: str | None = None,
    images: Path | str | None = None,
    license: str = "not stated",
    trust_code: bool = False,
) -> dict[str, Any]:
    """Writes trained peers as one file: decoded uint8 images (B, 3, S, S) in, embeddings (B, D) of length 1 out.

    The evaluation view and the scaling are inside; B may vary. The file is run and compared with PyTorch before it gets
    its name. It contains metadata: the names of the training classes, the preprocessing, versions, the fingerprint and
    the licence.

    Args:
        run: the run's folder.
        out: the file, which must not exist yet.
        peer: the name of a peer, or ``ensemble``: the concatenated embedding of all.
        format: ``onnx``, or ``torch``: a file of torch.export (.pt2).
        precision: ``fp32``; ``fp16``: the nets compute in float16; ``int8``: dynamic quantisation by onnxruntime, of
            format ``onnx`` only.
        weights: as for :func:`~ray_dmml.inference.load_cohort`.
        images: what the file is compared on: a folder with one folder a class, or a manifest. None: the images that
            the run was evaluated on.
        license: the licence of the weights, for the metadata.
        trust_code: build own backbones that the run's config names, and read its own data set.

    Returns:
        ``file``, ``bytes``, ``peer``, ``format``, ``precision``, ``embedding_size``, ``split`` and ``num_images`` of
        the comparison, ``largest_difference``, and pairs ``{"pytorch": ..., "file": ...}`` of ``recall@1`` and
        ``images_per_second``.

    Raises:
        UserError: the run, the peer or the images cannot be used, the file exists or cannot be written, the net cannot
            be exported, or the file differs from PyTorch by more than 1e-4 (fp32) or 0.2 points of Recall@1 (fp16,
            int8). There is no file then.
    """
    _require_known(format, precision)
    target, run_dir = _new_file(Path(out)), RunDir.open(run)
    config = run_dir.config()
    for setting in ("backbone", *(["data.name"] if images is None else [])):
        how = "--trust-code, or trust_code=True in Python"
        load_trusted_parts(config, run_dir.path, trust_code, how, settings=setting)
    cohort = load_cohort(run, weights, trust_code=trust_code)
    peers = _chosen(cohort, peer, run_dir)
    try:
        split, compared_on = images_to_evaluate(config, run_dir, images)
    except UserError as error:
        raise UserError(f"the file is compared with PyTorch on images, and {error}; other images: --images") from None
    try:
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", ignore_cleanup_errors=True) as folder:
            draft = Path(folder) / target.name
            facts = _metadata(cohort, peer, peers, run_dir, precision, license)
            reference = _reference(cohort, peer)
            logger.debug("writing %s as a file of format %s, %s", peer, format, precision)
            embed = _write(peers, peer, cohort.decode_size, draft, facts, format, precision)
            parity = compare(reference, embed, compared_on)
            _require_near(parity, target, precision, split)
            wait_for_disk(draft)
            _new_file(target)
            os.replace(draft, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    return {
        "file": str(target),
        "bytes": target.stat().st_size,
        "peer": peer,
        "format": format,
        "precision": precision,
        "embedding_size": facts["embedding_size"],
        "split": split,
        "num_images": parity.num_images,
        "largest_difference": parity.difference,
        "recall@1": dict(zip(("pytorch", "file"), parity.recall_at_1, strict=True)),
        "images_per_second": dict(zip(("pytorch", "file"), parity.images_per_second, strict=True)),
    }


def _require_known(format: str, precision: str) -> None:
    for name, value, allowed in (("format", format, FORMATS), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    if format == "torch" and precision == "int8":
        raise UserError("precision int8 is onnxruntime's dynamic quantisation, which format torch does not have")
    if format == "onnx":
        require_onnx()


def _new_file(path: Path) -> Path:
    """The path, if a file can be made there."""
    if os.path.lexists(path):
        raise UserError(f"{path} already exists; give another file (out), or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: {path.parent} is not an existing folder")
    return path


def _chosen(cohort: TrainedCohort, peer: str, run_dir: RunDir) -> list[TrainedPeer]:
    if peer == ENSEMBLE:
        return list(cohort.peers.values())
    if peer not in cohort.peers:
        raise UserError(f"{run_dir.path} has no peer {peer!r}; it has {', '.join(cohort.peers)}, and {ENSEMBLE}")
    return [cohort.peers[peer]]


def _reference(cohort: TrainedCohort, peer: str) -> Callable[[Tensor], Tensor]:
    """PyTorch's embeddings."""
    if peer == ENSEMBLE:
        return lambda images: torch.from_numpy(cohort.embed(images))
    return cohort.peers[peer].embed


def _write(
    peers: list[TrainedPeer],
    name: str,
    decode_size: int,
    path: Path,
    facts: dict[str, Any],
    format: str,
    precision: str,
) -> Callable[[Tensor], Tensor]:
    """Writes the file and loads it again."""
    nets = [(cast(CenterView, peer.view.pipeline), peer.net) for peer in peers]
    program = traced(Embedder(nets, half=precision == "fp16"), decode_size, name)
    if format == "torch":
        write_torch(program, path, facts)
        return load_torch(path)
    write_onnx(program, path, facts, quantise=precision == "int8")
    return load_onnx(path)


def _metadata(
    cohort: TrainedCohort, name: str, peers: list[TrainedPeer], run_dir: RunDir, precision: str, license: str
) -> dict[str, Any]:
    trained = ImageList.read(run_dir.images_file)
    return {
        "peer": name,
        "embedding_size": sum(peer.net.embedding_size for peer in peers),
        "precision": precision,
        "preprocessing": {
            "decode_size": cohort.decode_size,
            "resize": cohort.resize,
            "peers": [_preprocessing(peer) for peer in peers],
        },
        "classes": [] if trained is None else list(trained.training_set().class_names),
        "fingerprint": cohort.fingerprint if name == ENSEMBLE else peers[0].fingerprint,
        "license": license,
        "versions": versions_of("ray-dmml", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime"),
    }


def _preprocessing(peer: TrainedPeer) -> dict[str, Any]:
    """What the file does with a decoded image, for a reader."""
    view = peer.view.pipeline
    return {
        "resized_to": view.resized,
        "center_crop": view.size,
        "mean": peer.preprocessing["mean"],
        "std": peer.preprocessing["std"],
    }


def _require_near(parity: Parity, target: Path, precision: str, split: str) -> None:
    """Raises UserError with the figures if the file is not what PyTorch computes."""
    before, after = parity.recall_at_1
    if precision == "fp32":
        is_near, allowed = parity.difference <= MAX_DIFFERENCE, f"{MAX_DIFFERENCE:g} in an embedding"
    else:
        is_near = parity.difference < float("inf") and abs(after - before) <= MAX_RECALL_DIFFERENCE + 1e-12
        allowed = f"{100 * MAX_RECALL_DIFFERENCE:g} points of Recall@1"
    if not is_near:
        raise UserError(
            f"{target} is not exported, because {precision} may differ from PyTorch by {allowed} at most: embeddings "
            f"differ by up to {parity.difference:.2g}, and Recall@1 is {100 * after:.2f} % instead of "
            f"{100 * before:.2f} %, on {parity.num_images:,} {split} images"
        )
