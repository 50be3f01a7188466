"""Writes the list of characters of the built-in data set: ray_dmml/data/datasets/characters.txt.

    python experiments/make_characters.py

It needs fontTools, which matplotlib brings.
"""

from __future__ import annotations

import unicodedata

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image

from ray_dmml.data.datasets.characters import FACES, LIST, face_file, render

MIN_FACES = 13
LARGEST = 1.4
"""The largest height and width of a glyph, in ems. Larger ones would make all others tiny."""

LOOK_ALIKE = 0.05
"""Two glyphs look the same if no more of their ink differs (squared, relative to the heavier one)."""


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
                glyph = render(chr(code), face, em)
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
    masks: dict[int, int] = {}
    for face in range(len(FACES)):
        with TTFont(face_file(face), lazy=True) as font:
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


if __name__ == "__main__":
    LIST.write_text("".join(f"{code:04x} {mask:04x}\n" for code, mask in choose_characters().items()), "ascii")
