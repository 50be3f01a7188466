"""The same images under every peer's view, to look at before a day of training is spent on a wrong augmentation."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ray_dmml.atomic_files import replace_file
from ray_dmml.config.parts import load_parts, load_trusted_parts
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.data.augmentations import View, view_name, views_of
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError
from ray_dmml.loggers.pictures import Columns, draw_sheet
from ray_dmml.models.embedding_net import input_of
from ray_dmml.randomness import derive_seed, seeded
from ray_dmml.training.run_dir import RunDir

SMALLEST_CELL, LARGEST_CELL = 96, 224  # in pixels, of a picture in a sheet

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}


def write_views(
    config: Config,
    out: Path | str,
    *,
    run: Path | str | None = None,
    num_images: int = 8,
    num_draws: int = 3,
    seed: int = 0,
    overwrite: bool = False,
    trust_code: bool = False,
) -> None:
    """Writes a contact sheet: a row for each image; as columns the decoded image, several draws of each peer's view,
    and the evaluation views.

    The images are training images of different classes. They go through the very transforms of training, at their sizes
    and seeded like those of its first steps. What a net gets is uint8, and the sheet shows it unchanged; it is
    standardised in the net.

    Args:
        config: the experiment.
        out: a PNG, JPEG or WebP file.
        run: folder of the run whose config it is, which may be somebody else's; None: the config is the caller's own.
        num_images: number of rows.
        num_draws: columns of each random view.
        seed: another seed gives other images and other draws.
        overwrite: replace the file if it exists.
        trust_code: run the own parts that the config of ``run`` names.

    Raises:
        UserError: the file exists, cannot be written or is of another format, an image cannot be read, or a view cannot
            be built or fails.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out} must be a file that ends with {', '.join(FORMATS)}")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{out} already exists; give another file (out), or allow to replace it (overwrite)")
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: {out.parent} is not a folder")
    skip = frozenset[str]()
    if run is None:
        load_parts(config)
    else:
        run_dir = RunDir.open(run)
        load_trusted_parts(config, run_dir.path, trust_code, "--trust-code, or trust_code=True in Python")
        skip = frozenset(run_dir.environment().get("skipped_images", ()))
    images = load_splits(config.data, skip=skip, check=False).train
    sheet = draw_views(config, images, num_images, num_draws=num_draws, seed=seed)
    content = io.BytesIO()
    sheet.save(content, FORMATS[out.suffix.lower()])
    replace_file(out, content.getvalue())


def draw_views(
    config: Config,
    images: ImageSet,
    num_images: int = 8,
    *,
    num_draws: int = 3,
    seed: int = 0,
    largest_cell: int = LARGEST_CELL,
) -> Image.Image:
    """The sheet of :func:`write_views`. ``images`` are the training images of the config; ``largest_cell`` is the side,
    in pixels, to which larger pictures are reduced.

    Raises:
        UserError: an image cannot be read, or a view cannot be built or fails.
    """
    chosen = choose_images(images.labels, num_images, seed)
    decoded = torch.stack([images.source.read(index) for index in chosen])
    groups = view_columns(config, decoded, num_draws, seed)
    largest = max(picture.shape[-1] for group in groups for picture in group.pictures)
    rows = [(images.class_names[images.labels[index]], printable(images.source.name(index))) for index in chosen]
    return draw_sheet(rows, groups, min(largest_cell, max(SMALLEST_CELL, largest)))


def view_columns(config: Config, decoded: Tensor, num_draws: int, seed: int) -> list[Columns]:
    """The columns of the sheet for decoded images (N, 3, S, S) uint8: the images, each peer's view, and the evaluation
    views."""
    groups = [Columns("decoded", f"{_pixels(decoded.shape[-1])}", ("",), (decoded,))]
    evaluated: dict[tuple[int, float], tuple[View, list[str]]] = {}  # peers that are evaluated alike
    for peer in config.cohort.peers:
        size, own_crop = input_of(peer)
        view, evaluation = views_of(peer, size, own_crop, config.data.decode_size)
        crop = peer.eval_crop or own_crop
        evaluated.setdefault((size, crop), (evaluation, []))[1].append(str(peer.name))
        if not (peer.frozen and peer.teacher_view == "evaluation"):
            steps = range(seed * num_draws, (seed + 1) * num_draws)
            note = f"{'frozen, ' if peer.frozen else ''}view {view_name(peer.view)}, {_pixels(size)}"
            captions = tuple(f"draw {number}" for number in range(1, num_draws + 1))
            draws = tuple(_draw(config, peer, view, step, decoded) for step in steps)
            groups.append(Columns(str(peer.name), note, captions, draws))
    for (size, _), (view, names) in evaluated.items():
        groups.append(Columns("evaluation", f"{', '.join(names)}, {_pixels(size)}", ("",), (view(decoded),)))
    return groups


def choose_images(labels: np.ndarray, number: int, seed: int) -> list[int]:
    """Random images of different classes, as far as there are so many."""
    order = np.random.Generator(np.random.PCG64(derive_seed("views", seed))).permutation(len(labels))
    rounds, seen = [], Counter[int]()
    for label in labels[order].tolist():  # the first image of every class, then the second ones
        rounds.append(seen[label])
        seen[label] += 1
    return order[np.argsort(rounds, kind="stable")][:number].tolist()


def _draw(config: Config, peer: PeerConfig, view: View, step: int, decoded: Tensor) -> Tensor:
    """(N, 3, H, H) uint8: the images under a random view, seeded like a step of training."""
    with seeded(config.seed, peer.seed or 0, step, "view"):
        return view(decoded)


def _pixels(size: int) -> str:
    return f"{size}\N{NO-BREAK SPACE}px"
