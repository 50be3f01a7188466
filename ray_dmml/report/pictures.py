"""Small pictures of images as data URIs, within a number of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import ImageSource
from ray_dmml.report.data import Picture

SIDES = (144, 120, 96, 80, 64, 48)
"""Lengths in pixels of the longer side; the first that fits is taken."""

QUALITY = 75
TILE_SIDES, TILE_QUALITY, SHEET_COLUMNS = (56, 40, 28), 62, 16
"""Of the pictures on the map: 16 x 16 are one sheet."""

MAX_ASPECT_RATIO = 4

T = TypeVar("T")
R = TypeVar("R")


def thumbnails(source: ImageSource, uses: Mapping[int, int], max_bytes: int) -> tuple[dict[int, Picture], int]:
    """Pictures of the images, at most ``max_bytes`` of text in all, and how many could not be read.

    Args:
        source: reads the images.
        uses: how often each image stands on the page.
        max_bytes: the pictures are made smaller until they fit.
    """

    def read(index: int) -> Image.Image | None:
        try:
            return _shrunk(_picture(source, index, SIDES[0]), SIDES[0])
        except Exception:  # files may be gone, and decoders raise nearly anything
            return None

    large = {index: image for index, image in _in_threads(read, list(uses)) if image is not None}
    num_missing = len(uses) - len(large)
    side: int | None = SIDES[0]
    while side is not None:
        pictures = dict(_in_threads(partial(_encoded_at, side, large), list(large)))
        num_bytes = sum(uses[index] * len(picture.uri) for index, picture in pictures.items())
        if num_bytes <= max_bytes:
            return pictures, num_missing
        # The bytes fall more slowly than the area.
        fitting = side * (max_bytes / num_bytes) ** (1 / 1.6)
        side = next((each for each in SIDES if each < side and each <= max(fitting, SIDES[-1])), None)
    return {}, num_missing


def sheets(source: ImageSource, chosen: Sequence[int], max_bytes: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Sheets of 16 x 16 small square pictures in the order of ``chosen``, and what the page's script needs to find one
    in them. There is none if not even the smallest fit."""

    def read(index: int) -> Image.Image | None:
        try:
            pixels = source.read(index)
            step = max(1, min(pixels.shape[1:]) // (2 * TILE_SIDES[0]))  # twice the side is enough to resize
            return _image(pixels[:, ::step, ::step]).resize((TILE_SIDES[0],) * 2, Image.Resampling.BILINEAR)
        except Exception:
            return None

    tiles = [image for _, image in _in_threads(read, list(chosen))]
    per_sheet = SHEET_COLUMNS**2
    parts = [tiles[start : start + per_sheet] for start in range(0, len(tiles), per_sheet)]
    for side in TILE_SIDES:
        uris = tuple(uri for _, uri in _in_threads(partial(_sheet, side), parts))
        if sum(map(len, uris)) <= max_bytes:
            return {"side": side, "columns": SHEET_COLUMNS}, uris
    return {}, ()


def _picture(source: ImageSource, index: int, at_least: int) -> Tensor:
    """In its own proportions where the source can give it."""
    of_source = getattr(source, "picture", None)
    return source.read(index) if of_source is None else of_source(index, at_least)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def _shrunk(picture: Tensor | Image.Image, side: int) -> Image.Image:
    """At most ``side`` pixels long, and not much longer than wide."""
    image = _image(picture) if isinstance(picture, Tensor) else picture
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) > longest:
        left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
        image = image.crop((left, top, image.width - left, image.height - top))
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image


def _encoded_at(side: int, images: Mapping[int, Image.Image], index: int) -> Picture:
    image = _shrunk(images[index], side)
    return Picture(jpeg_uri(image, QUALITY), image.width, image.height)


def _sheet(side: int, tiles: Sequence[Image.Image | None]) -> str:
    sheet = Image.new("RGB", (SHEET_COLUMNS * side, -(-len(tiles) // SHEET_COLUMNS) * side), "#888")
    for number, tile in enumerate(tiles):
        if tile is not None:
            sheet.paste(tile.resize((side, side)), (number % SHEET_COLUMNS * side, number // SHEET_COLUMNS * side))
    return jpeg_uri(sheet, TILE_QUALITY)


def jpeg_uri(image: Image.Image, quality: int) -> str:
    """An RGB image as a data URI."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)  # WebP is 8 % smaller, and takes 6 times as long
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[tuple[T, R]]:
    """Each item with its result, in order."""
    with ThreadPoolExecutor(num_cores()) as pool:
        return list(zip(items, pool.map(function, items), strict=True))
