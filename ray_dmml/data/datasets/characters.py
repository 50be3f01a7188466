"""The built-in data set: characters rendered in the 16 text faces that matplotlib ships.

A class is a letter, digit or sign. Its images are that character in 13 to 16 faces, so retrieval has to match a
character across typefaces. Characters that look the same in a face (Latin A, Greek Alpha) are one class, named by the
lowest code point. It takes seconds to compare them all, so the list is in ``characters.txt``; ``python
experiments/make_characters.py`` writes it.
"""

from __future__ import annotations

import importlib.util
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
LIST = Path(__file__).with_name("characters.txt")


class CharacterImages:
    """Glyphs, dark on light and centred, by (code point, index of the face). The em is S / 1.5 pixels."""

    def __init__(self, glyphs: Sequence[tuple[int, int]], decode_size: int) -> None:
        self.glyphs, self.decode_size = tuple(glyphs), decode_size

    def __len__(self) -> int:
        return len(self.glyphs)

    def name(self, index: int) -> str:
        code, face = self.glyphs[index]
        return f"U+{code:04X} in {FACES[face]}"

    def subset(self, indices: Sequence[int]) -> CharacterImages:
        return CharacterImages([self.glyphs[index] for index in indices], self.decode_size)

    def read(self, index: int) -> Tensor:
        (code, face), size = self.glyphs[index], self.decode_size
        glyph = render(chr(code), face, round(size / 1.5))
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
        face_file(face)
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
def face_file(face: int) -> Path:
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
        fonts[face, em] = ImageFont.truetype(str(face_file(face)), em, layout_engine=ImageFont.Layout.BASIC)
    return fonts[face, em]


def render(character: str, face: int, em: int) -> Image.Image | None:
    """The character's ink, 0 to 255, cropped to its bounding box; None if it has none."""
    canvas = Image.new("L", (3 * em, 3 * em), 0)
    ImageDraw.Draw(canvas).text((em // 2, em // 2), character, fill=255, font=_font(face, em))
    box = canvas.getbbox()
    return None if box is None else canvas.crop(box)
