"""The built-in data set: characters rendered in the 16 text faces that matplotlib ships.

A class is a letter, digit or sign. Its images are that character in 13 to 16 faces, so retrieval has
to match a character across typefaces. Characters that look the same in a face (Latin A, Greek
Alpha) are one class, named by the lowest code point. It takes seconds to compare them all, so the
list is in ``characters.txt``; ``python -m ray_dmml.data.datasets.characters --write`` writes it.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ray_dmml.data.dataset import BadImageError, ImageSet
from ray_dmml.errors import UserError
from ray_dmml.randomness import derive_seed

FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
MIN_FACES = 13
LARGEST = 1.4
"""The largest height and width of a glyph, in ems. Larger ones would make all others tiny."""

LOOK_ALIKE = 0.05
"""Two glyphs look the same if no more of their ink differs (squared, relative to the heavier one)."""

LIST = Path(__file__).with_name("characters.txt")


class CharacterImages:
    """Glyphs, dark on light and centred. All characters of a face have one font size.

    Args:
        glyphs: (code point, index of the face) of each image.
        decode_size: S: images are (3, S, S) uint8 and the em is S / 1.5 pixels.
    """

    def __init__(self, glyphs: Sequence[tuple[int, int]], decode_size: int) -> None:
        self.glyphs = tuple(glyphs)
        self.decode_size = decode_size

    def __len__(self) -> int:
        return len(self.glyphs)

    def name(self, index: int) -> str:
        code, face = self.glyphs[index]
        return f"U+{code:04X} in {FACES[face]}"

    def read(self, index: int) -> Tensor:
        code, face = self.glyphs[index]
        size = self.decode_size
        glyph = _render(chr(code), face, round(size / 1.5))
        if glyph is None or max(glyph.size) > size:
            raise BadImageError(f"image {self.name(index)} cannot be rendered in {size} pixels")
        square = Image.new("L", (size, size), 255)
        corner = ((size - glyph.width) // 2, (size - glyph.height) // 2)
        square.paste(0, (*corner, corner[0] + glyph.width, corner[1] + glyph.height), mask=glyph)
        return torch.from_numpy(np.array(square)).repeat(3, 1, 1)


def load(decode_size: int) -> tuple[ImageSet, ImageSet]:
    """Training and test classes: half of a fixed shuffle each, so that both have all scripts.

    Raises:
        UserError: matplotlib's fonts are missing.
    """
    for face in range(len(FACES)):
        _face_file(face)
    rows = [line.split() for line in LIST.read_text(encoding="ascii").splitlines()]
    generator = np.random.Generator(np.random.PCG64(derive_seed("characters")))
    shuffled = [rows[i] for i in generator.permutation(len(rows))]
    half = len(rows) // 2
    return _image_set(shuffled[:half], decode_size), _image_set(shuffled[half:], decode_size)


def _image_set(rows: list[list[str]], decode_size: int) -> ImageSet:
    glyphs, labels, names = [], [], []
    for label, (code_text, faces_text) in enumerate(rows):
        code, mask = int(code_text, 16), int(faces_text, 16)
        faces = [face for face in range(len(FACES)) if mask >> face & 1]
        glyphs += [(code, face) for face in faces]
        labels += [label] * len(faces)
        names.append(f"U+{code:04X} {unicodedata.name(chr(code))}")
    return ImageSet(CharacterImages(glyphs, decode_size), np.array(labels, dtype=np.int64), tuple(names))


@cache
def _face_file(face: int) -> Path:
    package = importlib.util.find_spec("matplotlib")  # without importing it
    if package is None or not package.submodule_search_locations:
        raise UserError("data.name 'characters' draws with matplotlib's fonts: install matplotlib")
    fonts = Path(package.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    path = fonts / f"{FACES[face]}.ttf"
    if not path.is_file():
        raise UserError(f"data.name 'characters' needs matplotlib's font {path}, which is missing")
    return path


_local = threading.local()  # threads must not share FreeType's faces


def _font(face: int, em: int) -> ImageFont.FreeTypeFont:
    fonts: dict[tuple[int, int], ImageFont.FreeTypeFont] = _local.__dict__.setdefault("fonts", {})
    if (face, em) not in fonts:
        # Pillow has the basic layout built in. The other one depends on a library of the system.
        fonts[face, em] = ImageFont.truetype(str(_face_file(face)), em, layout_engine=ImageFont.Layout.BASIC)
    return fonts[face, em]


def _render(character: str, face: int, em: int) -> Image.Image | None:
    """The character's ink, 0 to 255, cropped to its bounding box; None if it has none."""
    canvas = Image.new("L", (3 * em, 3 * em), 0)
    ImageDraw.Draw(canvas).text((em // 2, em // 2), character, fill=255, font=_font(face, em))
    box = canvas.getbbox()
    return None if box is None else canvas.crop(box)


def choose_characters(em: int = 40) -> dict[int, int]:
    """Code point -> bit mask of the faces that have it, for every character that is a class.

    Letters, numbers, signs and punctuation become classes, from the lowest code point up, if at
    least 13 faces have them, they have ink, are at most 1.4 em large, and resemble no earlier class
    in any face.
    """
    faces_of = _coverage()
    side = int(LARGEST * em)
    glyphs = {code: np.zeros((len(FACES), side * side), dtype=np.float32) for code in sorted(faces_of)}
    for code, pictures in list(glyphs.items()):
        for face in range(len(FACES)):
            if faces_of[code] >> face & 1:
                glyph = _render(chr(code), face, em)
                if glyph is None or max(glyph.size) > side:
                    del glyphs[code]
                    break
                square = Image.new("L", (side, side), 0)
                square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
                pictures[face] = np.asarray(square, dtype=np.float32).ravel() / 255
    codes = list(glyphs)
    alike = _look_alikes(np.stack([glyphs[code] for code in codes], axis=1))
    kept: list[int] = []
    for index in range(len(codes)):
        if not alike[index, kept].any():
            kept.append(index)
    return {codes[index]: faces_of[codes[index]] for index in kept}


def _coverage() -> dict[int, int]:
    from fontTools.ttLib import TTFont  # only to make the list

    masks: dict[int, int] = {}
    for face in range(len(FACES)):
        with TTFont(_face_file(face), lazy=True) as font:
            for code in font.getBestCmap():
                masks[code] = masks.get(code, 0) | 1 << face
    return {
        code: mask
        for code, mask in masks.items()
        if mask.bit_count() >= MIN_FACES and unicodedata.category(chr(code))[0] in "LNSP"
    }


def _look_alikes(pictures: np.ndarray) -> np.ndarray:
    """(faces, C, pixels) -> (C, C) bool: the two look the same in at least one face."""
    alike = np.zeros((pictures.shape[1], pictures.shape[1]), dtype=bool)
    for picture in pictures:
        ink = (picture * picture).sum(axis=1)
        difference = ink[:, None] + ink[None] - 2 * picture @ picture.T
        has_both = (ink[:, None] > 0) & (ink[None] > 0)
        alike |= has_both & (difference < LOOK_ALIKE * np.maximum(ink[:, None], ink[None]))
    return alike


def main(arguments: Sequence[str]) -> None:
    """Prints the list of characters; ``--write`` writes it to ``characters.txt``."""
    text = "".join(f"{code:04x} {mask:04x}\n" for code, mask in choose_characters().items())
    if list(arguments) == ["--write"]:
        LIST.write_text(text, encoding="ascii")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
