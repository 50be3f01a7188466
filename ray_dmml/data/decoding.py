"""Decodes image files of the usual formats to uint8 RGB tensors, within bounds on memory."""

from __future__ import annotations

import io
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor

from ray_dmml.data.formats import formats
from ray_dmml.data.orientation import orientation_of, turn

Resize = Literal["stretch", "center_crop"]

MAX_PIXELS = 178_956_970  # 0.5 GiB as uint8 RGB; Pillow's own limit is the same
MAX_FILE_BYTES = 2**30  # as many pixels, with 16 bits a channel and no compression

# torchvision decodes these faster. A corrupt PNG ends its process (torchvision 0.29: SIGSEGV), and
# of a GIF it decodes every frame, so Pillow decodes those.
_FORMATS_OF_TORCHVISION = frozenset({"JPEG", "MPO", "WEBP"})
_MAX_ASPECT_RATIO = 16


class TooManyPixelsError(OSError):
    """An image is larger than what is decoded."""


class Box(NamedTuple):
    """A part of an upright image, in pixels from its top left corner. The last row and column are not in it."""

    left: int
    top: int
    right: int
    bottom: int

    def __str__(self) -> str:
        return f"x {self.left} to {self.right}, y {self.top} to {self.bottom}"


def decode(path: Path) -> Tensor:
    """Decodes an image file to uint8 (3, H, W), upright according to its EXIF or XMP.

    The content decides the format, not the suffix. The first frame of an animation is decoded. The size in the file's
    header is checked before memory is reserved for the pixels.

    Raises:
        OSError: the file is missing, empty, too large, or not an image.
        Exception: the file is corrupt; decoders raise nearly anything.
    """
    return decode_content(read_file(path))


def decode_content(array: np.ndarray, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Tensor:
    """The same for the content of an image file, uint8 (bytes,).

    Args:
        max_pixels: raises TooManyPixelsError for an image of more.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, which is faster, as long as both
            sides keep so many pixels.
    """
    with _open(array.tobytes(), max_pixels) as opened:
        if at_least is not None and opened.format in ("JPEG", "MPO"):
            opened.draft("RGB", (at_least, at_least))
        elif opened.format in _FORMATS_OF_TORCHVISION:
            # The import takes more than a second, and not every process decodes such files.
            from torchvision.io import ImageReadMode, decode_image

            with suppress(RuntimeError):  # rare kinds of JPEG; and Pillow's message says what is wrong
                # torchvision turns by the first APP1 segment of a JPEG only, and a WebP never.
                pixels = decode_image(torch.from_numpy(array), mode=ImageReadMode.RGB)
                return turn(pixels, orientation_of(opened))
        return _decode_with_pillow(opened)


def read_file(path: Path | str) -> np.ndarray:
    """The content of an image file, uint8 (bytes,). Raises OSError if it is missing, empty or too large."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
        raise OSError("it is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise OSError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
    array = np.fromfile(path, dtype=np.uint8)
    if not array.size:
        raise OSError("the file is empty")
    return array


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header of an image: its format and size. Pixels are not decoded yet."""
    too_large = f"it claims too many pixels: at most {max_pixels} are decoded"
    try:
        opened = Image.open(io.BytesIO(data), formats=formats())
    except Image.DecompressionBombError:
        raise TooManyPixelsError(too_large) from None
    if opened.width * opened.height > max_pixels:  # a program may have lifted Pillow's limit
        raise TooManyPixelsError(too_large)
    return opened


def _decode_with_pillow(opened: Image.Image) -> Tensor:
    orientation = orientation_of(opened) if opened.format == "TIFF" else 0
    tags = getattr(opened, "tag_v2", {}) if opened.format == "TIFF" else {}
    num_bits, white_is_zero = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(PHOTOMETRIC_INTERPRETATION) == 0
    opened.load()
    orientation = orientation or orientation_of(opened)
    is_16_bit = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM")
    opened.info.pop("transparency", None)  # alpha is dropped, and convert would warn of it
    if is_16_bit:  # convert would clip at 255, and Pillow leaves 12 bits and negatives of a TIFF as they are stored
        upper = (np.asarray(opened) >> (num_bits - 8)).astype(np.uint8)
        opened = Image.fromarray(255 - upper if white_is_zero else upper)
    elif opened.mode in ("I", "F"):
        raise OSError("its pixels have 32 bits, and nothing says which value is white")
    return turn(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1), orientation)


def crop(image: Tensor, box: Box) -> Tensor:
    """The part of uint8 (3, H, W) inside the box, which may reach beyond the image.

    Raises:
        ValueError: all of the box is outside.
    """
    height, width = image.shape[1:]
    left, top, right, bottom = max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height)
    if left >= right or top >= bottom:
        raise ValueError(f"the box is outside of its {width} x {height} pixels")
    return image[:, top:bottom, left:right]


def to_square(image: Tensor, size: int, resize: Resize) -> Tensor:
    """Resizes uint8 (3, H, W) to a contiguous (3, size, size), bilinear with antialiasing."""
    height, width = image.shape[1:]
    if resize == "stretch":
        target = (size, size)
    else:
        shorter = min(height, width)
        # Only the middle of a very long image is kept. Enlarging all of it might take gigabytes.
        for side in (1, 2):
            longest = min(image.shape[side], _MAX_ASPECT_RATIO * shorter)
            image = image.narrow(side, (image.shape[side] - longest) // 2, longest)
        height, width = image.shape[1:]
        target = (round(height * size / shorter), round(width * size / shorter))
    if (height, width) != target:
        image = torch.nn.functional.interpolate(image[None], size=target, mode="bilinear", antialias=True)[0]
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return image[:, top : top + size, left : left + size].contiguous()


def reason_of(error: Exception) -> str:
    """Why an image could not be decoded, for a message."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def printable(name: str) -> str:
    """A file's name for a message. Bytes that are not text and control characters are escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)
