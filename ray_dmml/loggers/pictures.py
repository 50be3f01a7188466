"""Pictures for people: sheets of images in rows and columns, with names."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, PALE, LINE = (255, 255, 255), (28, 32, 36), (92, 101, 111), (205, 210, 216)
RIGHT, WRONG = (26, 127, 66), (192, 43, 43)
"""The colours of the report. Many people cannot distinguish red from green, so frames of wrong pictures are dashed, and
a tick or a cross stands in the corner."""

MARGIN, GAP, BETWEEN_GROUPS, FRAME = 16, 4, 20, 3  # in pixels
DASH, BADGE = 8, 18
TEXT, LEADING = 13, 18
WIDEST_NAME = 200
MOST_LINES = 3
"""Of a heading. What is longer ends with an ellipsis."""


@dataclass(frozen=True)
class Columns:
    """Columns that belong together, under one heading."""

    title: str
    note: str
    """What stands below the title."""
    captions: tuple[str, ...]
    """What stands above each column."""
    pictures: tuple[Tensor, ...]
    """Of each column: (N, 3, H, H) uint8, a picture a row."""
    is_right: tuple[Sequence[bool | None], ...] = ()
    """Of each column: whether the picture of each row is right, which frames and marks it. None: it has neither."""


def draw_sheet(names: Sequence[tuple[str, str]], groups: Sequence[Columns], cell: int) -> Image.Image:
    """Draws pictures in rows and columns.

    Args:
        names: of each row: its name, and what stands below that.
        groups: the columns, from left to right. Empty ones are left out.
        cell: side, in pixels, at which every picture is shown.

    Returns:
        An RGB image.
    """
    groups = [group for group in groups if group.pictures]
    name_width = min(WIDEST_NAME, max((_width(text) for pair in names for text in pair), default=0))
    widths = [len(group.pictures) * (cell + GAP) - GAP for group in groups]
    headings = [
        (_wrapped(group.title, width, bold=True), _wrapped(group.note, width))
        for group, width in zip(groups, widths, strict=True)
    ]
    num_lines = max(len(title) + len(note) for title, note in headings)
    top = MARGIN + num_lines * LEADING + LEADING + GAP
    width = 2 * MARGIN + name_width + sum(widths) + BETWEEN_GROUPS * len(groups)
    sheet = Image.new("RGB", (width, top + len(names) * (cell + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (name, below) in enumerate(names):
        y = top + row * (cell + GAP) + (cell - 2 * LEADING) // 2
        draw.text((MARGIN, y), _cut(name, name_width), INK, _font())
        draw.text((MARGIN, y + LEADING), _cut(below, name_width, keeps_end=True), PALE, _font())
    x = MARGIN + name_width + BETWEEN_GROUPS
    for group, group_width, (title, note) in zip(groups, widths, headings, strict=True):
        y = MARGIN
        for lines, color, bold in ((title, INK, True), (note, PALE, False)):
            for line in lines:
                draw.text((x, y), line, color, _font(bold))
                y += LEADING
        for column, (caption, pictures) in enumerate(zip(group.captions, group.pictures, strict=True)):
            left = x + column * (cell + GAP)
            draw.text((left, top - GAP - LEADING), _cut(caption, cell), PALE, _font())
            marks = group.is_right[column] if group.is_right else [None] * len(names)
            for row, (picture, mark) in enumerate(zip(pictures, marks, strict=True)):
                _draw_picture(sheet, draw, picture, (left, top + row * (cell + GAP)), cell, mark)
        x += group_width + BETWEEN_GROUPS
    return sheet


def _draw_picture(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Tensor,
    corner: tuple[int, int],
    cell: int,
    mark: bool | None,
) -> None:
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    if image.width != cell:  # enlarged pixels stay visible
        way = Image.Resampling.NEAREST if cell >= 2 * image.width else Image.Resampling.BICUBIC
        image = image.resize((cell, cell), way)
    sheet.paste(image, corner)
    box = (*corner, corner[0] + cell - 1, corner[1] + cell - 1)
    if mark is None:
        draw.rectangle(box, outline=LINE)
        return
    draw.rectangle(box, outline=RIGHT if mark else WRONG, width=FRAME)
    if not mark:
        _cut_into_dashes(draw, box)
    _draw_badge(draw, corner, mark)


def _cut_into_dashes(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    """Gaps in a frame. There is none at its corners."""
    left, top, right, bottom = box
    for start in range(DASH, right - left - DASH, 2 * DASH):
        end = start + DASH // 2 - 1
        for y in (top, bottom - FRAME + 1):
            draw.rectangle((left + start, y, left + end, y + FRAME - 1), PAPER)
        for x in (left, right - FRAME + 1):
            draw.rectangle((x, top + start, x + FRAME - 1, top + end), PAPER)


def _draw_badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], is_right: bool) -> None:
    """A tick or a cross. They are lines, because not every typeface has these signs."""
    left, top = corner
    draw.rectangle((left, top, left + BADGE - 1, top + BADGE - 1), RIGHT if is_right else WRONG)
    strokes = [((4, 9), (8, 13), (14, 5))] if is_right else [((5, 5), (13, 13)), ((5, 13), (13, 5))]
    for stroke in strokes:
        draw.line([(left + x, top + y) for x, y in stroke], PAPER, 2)


def _wrapped(text: str, width: int, *, bold: bool = False) -> list[str]:
    """The text in lines of at most this width in pixels. It breaks at plain spaces."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and _width(f"{lines[-1]} {word}", bold) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [f"{lines[MOST_LINES - 1]} …"]
    return [_cut(line, width, bold) for line in lines]


def _cut(text: str, width: int, bold: bool = False, *, keeps_end: bool = False) -> str:
    """The text, with an ellipsis in place of what has no room: the end, or of a path the beginning."""
    if _width(text, bold) <= width:
        return text
    while text and _width(f"{text}…", bold) > width:
        text = text[1:] if keeps_end else text[:-1]
    return f"…{text}" if keeps_end else f"{text}…"


def _width(text: str, bold: bool = False) -> int:
    return int(np.ceil(_font(bold).getlength(text)))


@cache
def _font(bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A typeface of matplotlib, which has many scripts; Pillow's own where it is missing."""
    package = importlib.util.find_spec("matplotlib")  # without importing it
    if package is not None and package.submodule_search_locations:
        fonts = Path(package.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
        file = fonts / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), TEXT, layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.load_default(TEXT)
