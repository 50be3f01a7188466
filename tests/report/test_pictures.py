"""Pictures on the page are small, few enough bytes, and never the reason for a failure."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image
from report_samples import Squares

from ray_dmml.data.dataset import FileImages
from ray_dmml.report.pictures import SIDES, sheets, thumbnails


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def noise(path: Path, width: int, height: int) -> str:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path.name


def test_proportions_are_kept(tmp_path: Path) -> None:
    """Of the file, not of the square that nets get; a very long image shows its middle."""
    names = [noise(tmp_path / f"{w}.jpg", w, h) for w, h in ((800, 400), (300, 600), (50, 40), (900, 20))]
    pictures, missing = thumbnails(FileImages(tmp_path, names, 32), {n: 1 for n in range(4)}, 10**6)
    assert missing == 0
    sizes = [(pictures[n].width, pictures[n].height) for n in range(4)]
    assert sizes == [(144, 72), (72, 144), (50, 40), (80, 20)]
    assert all(opened(pictures[n].uri).size == size for n, size in enumerate(sizes))


def test_they_fit(tmp_path: Path) -> None:
    """They become smaller until all uses fit, and there are none if that is not enough."""
    names = [noise(tmp_path / f"{n}.jpg", 200 + n, 200) for n in range(3)]
    source, uses = FileImages(tmp_path, names, 32), {0: 5, 1: 1, 2: 1}
    large, _ = thumbnails(source, uses, 10**7)
    limit = sum(uses[n] * len(each.uri) for n, each in large.items()) // 3
    small, _ = thumbnails(source, uses, limit)
    assert sum(uses[n] * len(each.uri) for n, each in small.items()) <= limit
    assert max(each.width for each in small.values()) in SIDES[1:]
    assert thumbnails(source, uses, 100) == ({}, 0)


def test_images_that_cannot_be_read_are_counted() -> None:
    pictures, missing = thumbnails(Squares(range(5), broken=[1, 4]), {n: 1 for n in range(5)}, 10**6)
    assert set(pictures) == {0, 2, 3} and missing == 2


def test_sheets_hold_every_picture_in_its_place() -> None:
    """300 pictures need two sheets; the picture of a missing image is grey."""
    source = Squares(range(300), broken=[7])
    place, uris = sheets(source, range(300), 10**6)
    assert len(uris) == 2
    side, columns = place["side"], place["columns"]
    for n in (0, 6, 7, 255, 256, 299):
        within = n % columns**2
        box = opened(uris[n // columns**2]).convert("RGB")
        middle = (within % columns * side + side // 2, within // columns * side + side // 2)
        pixel = box.getpixel(middle)
        assert isinstance(pixel, tuple) and abs(pixel[0] - (136 if n == 7 else n % 256)) < 6
    assert sheets(source, range(300), 100) == ({}, ())


def test_a_large_image_on_a_sheet_is_whole(tmp_path: Path) -> None:
    """All of it is in the small picture, not a part."""
    pixels = np.zeros((400, 400, 3), np.uint8)
    pixels[200:, :, 0] = pixels[:, 200:, 1] = 255
    Image.fromarray(pixels).save(tmp_path / "quarters.png")
    place, [uri] = sheets(FileImages(tmp_path, ["quarters.png"], 400), [0], 10**6)
    sheet, side = opened(uri).convert("RGB"), place["side"]
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixel = sheet.getpixel((side * (1 + 2 * column) // 4, side * (1 + 2 * row) // 4))
        assert np.allclose(pixel, (255 * row, 255 * column, 0), atol=12)
