"""A photo is read upright, whatever its format and wherever its orientation is written."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin, features

from ray_dmml.data.decoding import decode

UPRIGHT = {6: "ROTATE_90", 3: "ROTATE_180", 8: "ROTATE_270", 5: "TRANSPOSE", 2: "FLIP_LEFT_RIGHT"}
"""How a photo is stored that an orientation turns upright again."""

FORMS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95},
    "MPO": {"quality": 95, "subsampling": 0},
}
if not features.check("avif"):
    del FORMS["AVIF"]


def photo() -> Image.Image:
    """64 x 48, dark, with a bright band on top that is brighter to its left."""
    image = Image.new("RGB", (64, 48), (20, 20, 20))
    image.paste((200, 200, 200), (0, 0, 64, 12))
    image.paste((255, 255, 255), (0, 0, 16, 12))
    return image


def stored(orientation: int) -> Image.Image:
    return photo().transpose(Image.Transpose[UPRIGHT[orientation]])


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tag(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def xmp(orientation: int, form: str = 'tiff:Orientation="{}"') -> bytes:
    inside = form.format(orientation).encode()
    if inside.startswith(b"<"):
        return b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + inside + b"</x:xmpmeta>"
    return b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description " + inside + b"/></x:xmpmeta>"


def segment(body: bytes) -> bytes:
    """APP1 of a JPEG."""
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def is_upright(content: bytes, folder: Path) -> bool:
    (folder / "x").write_bytes(content)
    image = decode(folder / "x")
    wanted = torch.from_numpy(np.array(photo())).permute(2, 0, 1)
    return image.shape == wanted.shape and (image.int() - wanted.int()).abs().float().mean() < 8


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", FORMS)
def test_exif(tmp_path: Path, form: str, orientation: int) -> None:
    """Every format that can have EXIF."""
    assert is_upright(encoded(stored(orientation), form, exif=tag(orientation), **FORMS[form]), tmp_path)


def test_an_animated_webp(tmp_path: Path) -> None:
    """Its first frame."""
    more = {"lossless": True, "save_all": True, "append_images": [stored(6).rotate(180)]}
    assert is_upright(encoded(stored(6), "WEBP", exif=tag(6), **more), tmp_path)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_jpeg_whose_exif_follows_other_segments(tmp_path: Path, orientation: int) -> None:
    """XMP without an orientation, and a segment of a program that nobody knows."""
    content = encoded(stored(orientation), "JPEG", exif=tag(orientation), **FORMS["JPEG"])
    first = segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp(1, "a:b='{}'")) + segment(b"Unknown\0" + bytes(200))
    assert is_upright(content[:2] + first + content[2:], tmp_path)


@pytest.mark.parametrize(
    "written",
    ['tiff:Orientation="{}"', "tiff:Orientation='{}'", "<tiff:Orientation>{}</tiff:Orientation>"],
)
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_xmp_alone(tmp_path: Path, form: str, written: str) -> None:
    """As Adobe and ExifTool write it."""
    block = xmp(6, written)
    options = dict(FORMS[form])
    if form == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", block.decode())
    elif form == "TIFF":
        options["tiffinfo"] = {700: block}
    else:
        options["xmp"] = block
    assert is_upright(encoded(stored(6), form, **options), tmp_path)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_exif_outweighs_xmp(tmp_path: Path, form: str) -> None:
    """Programs that turn an image often update EXIF alone."""
    more = {"tiffinfo": {274: 8, 700: xmp(3, "tiff:Orientation='{}'")}} if form == "TIFF" else {"xmp": xmp(3)}
    exif = {} if form == "TIFF" else {"exif": tag(8)}
    assert is_upright(encoded(stored(8), form, **exif, **more, **FORMS[form]), tmp_path)
    more = {"tiffinfo": {274: 1, 700: xmp(3)}} if form == "TIFF" else {"xmp": xmp(3)}
    exif = {} if form == "TIFF" else {"exif": tag(1)}
    assert is_upright(encoded(photo(), form, **exif, **more, **FORMS[form]), tmp_path)


def raw_profile(name: str, block: bytes) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    digits = block.hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    info.add_text(f"Raw profile type {name}", f"\n{name}\n{len(block):8}\n{lines}\n", zip=True)
    return info


@pytest.mark.parametrize("name", ["exif", "APP1", "xmp"])
def test_a_png_of_imagemagick(tmp_path: Path, name: str) -> None:
    """It writes EXIF and XMP as text of hexadecimal digits."""
    block = xmp(6) if name == "xmp" else tag(6).tobytes()
    assert block.startswith(b"Exif\0\0") or name == "xmp"
    assert is_upright(encoded(stored(6), "PNG", pnginfo=raw_profile(name, block)), tmp_path)


def test_a_png_whose_exif_follows_its_pixels(tmp_path: Path) -> None:
    """The standard allows it."""
    block = tag(6).tobytes()[6:]
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    content = encoded(stored(6), "PNG")
    end = content.index(b"IEND") - 4
    assert is_upright(content[:end] + chunk + content[end:], tmp_path)


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage that is no TIFF", tag(6).tobytes()[:20], b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_damaged_metadata_cost_no_image(tmp_path: Path, form: str, exif: bytes) -> None:
    """The pixels are used as they are stored."""
    assert is_upright(encoded(photo(), form, exif=exif, **FORMS[form]), tmp_path)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_means_nothing(tmp_path: Path, value: int) -> None:
    """0 and values above 8 are left as they are."""
    assert is_upright(encoded(photo(), "JPEG", exif=tag(value), **FORMS["JPEG"]), tmp_path)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
def test_all_orientations_equal_pillows(tmp_path: Path, form: str) -> None:
    """To the shape and, where nothing is lost, to the pixel."""
    noise = Image.effect_noise((21, 13), 60).convert("RGB")
    for orientation in range(1, 9):
        content = encoded(noise, form, exif=tag(orientation), **FORMS[form])
        (tmp_path / "x").write_bytes(content)
        with Image.open(io.BytesIO(content)) as opened:
            wanted = torch.from_numpy(np.array(ImageOps.exif_transpose(opened).convert("RGB"))).permute(2, 0, 1)
        got = decode(tmp_path / "x")
        assert got.shape == wanted.shape
        assert (got.int() - wanted.int()).abs().max() <= (2 if form == "JPEG" else 0)
