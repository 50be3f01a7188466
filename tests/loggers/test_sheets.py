"""Sheets of pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ray_dmml.loggers.pictures import BADGE, FRAME, PAPER, RIGHT, WRONG, Columns, draw_sheet


def noise(number: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, side, side), generator=generator).to(torch.uint8)


def find(sheet: np.ndarray, picture: Tensor) -> tuple[int, int] | None:
    """Row and column of the place where a picture is drawn, without what a frame and a badge may cover."""
    inner = picture[:, BADGE:-FRAME, BADGE:-FRAME].permute(1, 2, 0).numpy()
    side = len(inner)
    for row, column in zip(*np.nonzero((sheet == inner[0, 0]).all(axis=2)), strict=True):
        if np.array_equal(sheet[row : row + side, column : column + side], inner):
            return int(row) - BADGE, int(column) - BADGE
    return None


def test_every_picture_is_in_its_row_and_column() -> None:
    """Pixels are unchanged where a picture has the side of a cell; marks say what is right."""
    query, found = noise(2, 40), (noise(2, 40, seed=1), noise(2, 40, seed=2))
    marks = ([True, False], [None, True])
    groups = [
        Columns("query", "", ("",), (query,)),
        Columns("a title that is too long for its columns and goes on " * 9, "note", ("1", "2"), found, marks),
    ]
    sheet = np.asarray(draw_sheet([("first", "a.png"), ("second", "b.png")], groups, 40))
    places = [[find(sheet, picture) for picture in pictures] for pictures in (query, *found)]
    assert all(place is not None for column in places for place in column)
    rows, columns = np.array(places, dtype=int).transpose(2, 0, 1)
    assert (rows == rows[0]).all() and rows[0, 0] < rows[0, 1]
    assert (columns == columns[:, :1]).all() and columns[0, 0] < columns[1, 0] < columns[2, 0]
    cells = [[sheet[r : r + 40, c : c + 40] for r, c in column] for column in places]
    for cell, color in ((cells[1][0], RIGHT), (cells[1][1], WRONG), (cells[2][1], RIGHT)):
        colors = {tuple(pixel) for pixel in cell[-FRAME:].reshape(-1, 3).tolist()}  # of the lower side
        assert colors == ({color} if color == RIGHT else {color, PAPER})  # wrong ones are dashed
        badge = (cell[:BADGE, :BADGE] == color).all(axis=2)
        assert 0.6 < badge.mean() < 0.95  # with a sign inside
    assert np.array_equal(cells[0][0][1:-1, 1:-1], query[0, :, 1:-1, 1:-1].permute(1, 2, 0))  # without marks


def test_marks_need_no_colour() -> None:
    """In black and white, a wrong picture has another sign in its corner than a right one, and gaps in its frame."""
    black = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    right, wrong = (
        np.asarray(draw_sheet([("", "")], [Columns("", "", ("",), (black,), ([mark],))], 40)) for mark in (True, False)
    )
    differs = (right == PAPER).all(axis=2) != (wrong == PAPER).all(axis=2)
    (top, bottom), (left, _) = ((where.min(), where.max()) for where in np.nonzero((right != PAPER).any(axis=2)))
    assert differs[top + FRAME : top + BADGE, left + FRAME : left + BADGE].sum() > 20
    assert differs[bottom - FRAME + 1 : bottom + 1].sum() > 20


def test_pictures_of_other_sizes_fill_their_cells() -> None:
    small, large = noise(1, 20), noise(1, 80)
    sheet = draw_sheet([("", "")], [Columns("", "", ("", ""), (small, large))], 40)
    enlarged = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
    assert find(np.asarray(sheet), enlarged[0]) is not None
