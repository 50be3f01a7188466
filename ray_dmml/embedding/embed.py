"""Embeds the images of a folder, a manifest or a bucket with the trained peers of a run."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import torch

from ray_dmml.cores import num_cores
from ray_dmml.data.formats import decoder_versions
from ray_dmml.embedding.embedder import Dtype, Embedder, embed_locally
from ray_dmml.embedding.output import OutputFolder
from ray_dmml.embedding.place import Place, find_images
from ray_dmml.errors import UserError
from ray_dmml.inference import SavedPeers, TrainedCohort, read_peers
from ray_dmml.models.backbone import HUB
from ray_dmml.training.run_dir import lock_folder, versions_of

logger = logging.getLogger(__name__)

ENSEMBLE = "ensemble"
BATCH_SIZE, MAX_BATCH_SIZE = 64, 4096

OnProgress = Callable[[int, int, int], object]
"""Gets the number of images that are done, of all images, and of unreadable ones so far."""


def embed(
    run: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    peer: str = ENSEMBLE,
    weights: str | None = None,
    dtype: Dtype = "float32",
    root: Path | str | None = None,
    update: bool = False,
    local: bool = False,
    concurrency: int | None = None,
    batch_size: int | None = None,
    trust_code: bool = False,
    on_progress: OnProgress = lambda done, total, unreadable: None,
) -> dict[str, Any]:
    """Embeds images into Parquet files. The same call continues one that was interrupted.

    Args:
        run: the folder of a run.
        images: a folder, a manifest (CSV with a column ``path``) or a URI such as ``s3://bucket/photos``.
        out: the folder of the embeddings.
        peer: name of a peer, or ``ensemble`` for all of them.
        weights: ``last``, ``best`` or ``ema``. None: those of the run's results.
        dtype: ``float32`` or ``float16``.
        root: the folder that the paths of a manifest are relative to. None: that of the manifest.
        update: add images that are new since ``out`` was begun.
        local: in this process, without Ray: the same rows.
        concurrency: number of Ray's actors, or of threads with ``local``. None: one for each GPU or else each core.
        batch_size: images that the nets get at a time. None: 64, or that of ``out``.
        trust_code: build own backbones that the run's config names.
        on_progress: is called at the beginning and after each shard.

    Returns:
        ``out``, ``num_images``, ``num_unreadable``, ``size`` (D) and ``model`` (its fingerprint).

    Raises:
        UserError: there is no such run, peer or place; ``out`` is of another model or other images; the place of the
            images or ``out`` fails meanwhile. A file that cannot be read is a row with its error, and raises nothing.
    """
    if dtype not in get_args(Dtype):
        raise UserError(f"no dtype {dtype!r}; allowed: {', '.join(get_args(Dtype))}")
    if batch_size is not None and not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise UserError(f"batch_size is {batch_size}; allowed: 1 to {MAX_BATCH_SIZE}")
    if concurrency is not None and concurrency < 1:
        raise UserError(f"concurrency is {concurrency}; allowed: 1 or more")
    peers = read_peers(run, weights, trust_code=trust_code)
    if peer != ENSEMBLE:
        peers = peers.only(peer)
    place, paths = find_images(str(images), None if root is None else Path(root))
    is_on_gpu = local and torch.cuda.is_available()
    cohort = peers.build("cuda" if is_on_gpu else "cpu")
    model = cohort if peer == ENSEMBLE else cohort.peers[peer]
    output = OutputFolder(Path(out))
    output.create()
    with lock_folder(output.path, "embedding or indexing"):
        begun = output.facts() or {}
        batch_size = batch_size or begun.get("batch_size") or BATCH_SIZE
        facts = {
            "model": model.fingerprint,
            "peer": peer,
            "size": model.size,
            "dtype": dtype,
            "preprocessing": _preprocessing(cohort),
            "root": place.name,
            "versions": _versions(),
            "run": str(run) if str(run).startswith(HUB) else os.path.abspath(run),
            "weights": peers.config.weights_to_evaluate(weights),
            "batch_size": batch_size,
        }
        output.begin(facts, paths, update=update)
        on_progress(output.num_done, output.num_images, output.num_unreadable)
        if output.num_done < output.num_images:
            logger.debug("embedding %s images", f"{output.num_images - output.num_done:,}")
            if local:
                threads = concurrency or (2 if is_on_gpu else num_cores())
                embedder = Embedder(model, place, dtype, batch_size, max(threads, num_cores()))
                tables = embed_locally(embedder, output.missing(), threads)
            else:
                del cohort, model  # Ray's actors build their own
                tables = _on_ray(peers, peer, place, dtype, batch_size, output, concurrency)
            with closing(tables):
                for number, table in tables:
                    output.write(number, table)
                    on_progress(output.num_done, output.num_images, output.num_unreadable)
    counts = {"num_images": output.num_images, "num_unreadable": output.num_unreadable}
    return {"out": str(out), **counts, "size": facts["size"], "model": facts["model"]}


def _on_ray(
    peers: SavedPeers,
    peer: str,
    place: Place,
    dtype: Dtype,
    batch_size: int,
    output: OutputFolder,
    concurrency: int | None,
) -> Generator[tuple[int, pa.Table]]:
    from ray_dmml.embedding.on_ray import Task, embed_on_ray, quiet_session

    with quiet_session():
        task = Task(peers, peer == ENSEMBLE, place, dtype, batch_size)
        yield from embed_on_ray(task, output.missing(), concurrency)


def _preprocessing(cohort: TrainedCohort) -> dict[str, Any]:
    """What is done with an image before the backbones get it."""
    peers = {name: dict(peer.preprocessing) for name, peer in cohort.peers.items()}
    return {"decode_size": cohort.decode_size, "resize": cohort.resize, "peers": peers}


def _versions() -> dict[str, str]:
    """Of what the bits of an embedding depend on."""
    versions = versions_of("ray-dmml", "torch", "timm", "numpy", "pyarrow")
    return {**versions, "decoders": " ".join(decoder_versions()), "python": platform.python_version()}
