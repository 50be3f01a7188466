"""Turns photos upright that a camera stored on their side."""

from __future__ import annotations

import re
from contextlib import suppress

from PIL import ExifTags, Image
from torch import Tensor

# How an image is turned: (height and width exchanged, and then dimensions of (3, H, W) reversed), by EXIF orientation.
_TURNS = {
    1: (False, ()), 2: (False, (2,)), 3: (False, (1, 2)), 4: (False, (1,)),
    5: (True, ()), 6: (True, (2,)), 7: (True, (1, 2)), 8: (True, (1,)),
}  # fmt: skip

# Pillow reads some of these, but no single quotes.
_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")

# Decoders that turn the image themselves. A TIFF is turned by its tag, and not by every form of XMP.
_TURN_THEMSELVES = frozenset({"HEIF", "JXL"})


def orientation_of(opened: Image.Image) -> int:
    """How to :func:`turn` the pixels of a file: its EXIF orientation, or else that of its XMP, or else 1.

    Damaged metadata state nothing. Ask when a PNG is loaded, because its metadata may follow its pixels. Ask before a
    TIFF is loaded, because Pillow turns its pixels while it loads them.
    """
    if opened.format in _TURN_THEMSELVES:
        return 1
    if _stated(opened):
        return 1 if opened.format == "TIFF" else _stated(opened)
    for key in ("xmp", "Raw profile type xmp", "Raw profile type APP1"):  # the last two by ImageMagick, in PNG
        text = opened.info.get(key, b"")
        with suppress(Exception):
            block = _profile(text) if key.startswith("Raw") else text
            if block.startswith(b"Exif\0\0"):
                exif = Image.Exif()
                exif.load(block)
                return _valid(exif) or 1
            if match := _XMP.search(block):
                return int(match[1])
    return 1


def turn(image: Tensor, orientation: int) -> Tensor:
    """(3, H, W) as stored -> (3, H, W) or (3, W, H), upright."""
    exchange, flips = _TURNS[orientation]
    image = image.transpose(1, 2) if exchange else image
    return image.flip(flips) if flips else image


def _stated(opened: Image.Image) -> int:
    """1 to 8; 0: Pillow finds none."""
    with suppress(Exception):
        return _valid(opened.getexif())
    return 0


def _valid(exif: Image.Exif) -> int:
    value = exif.get(ExifTags.Base.Orientation)
    return int(value) if value in _TURNS else 0


def _profile(text: str | bytes) -> bytes:
    """The bytes of a profile that ImageMagick wrote in hexadecimal digits, after its name and length."""
    digits = text.decode("latin-1") if isinstance(text, bytes) else text
    return bytes.fromhex(digits.split("\n", 3)[3])  # it ignores the other line ends
