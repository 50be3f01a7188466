"""Sheets of pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ray_dmml.loggers.pictures import FRAME, RIGHT, WRONG, Columns, draw_sheet


def noise(number: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, side, side), generator=generator).to(torch.uint8)


def find(sheet: np.ndarray, picture: Tensor) -> tuple[int, int] | None:
    """Row and column of the place where the inner part of a picture is drawn."""
    inner = picture[:, FRAME:-FRAME, FRAME:-FRAME].permute(1, 2, 0).numpy()
    side = len(inner)
    for row, column in zip(*np.nonzero((sheet == inner[0, 0]).all(axis=2)), strict=True):
        if np.array_equal(sheet[row : row + side, column : column + side], inner):
            return int(row), int(column)
    return None


def test_every_picture_is_in_its_row_and_column() -> None:
    """Pixels are unchanged where a picture has the side of a cell; frames say what is right."""
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
    frames = [[tuple(sheet[r - 1, c - 1].tolist()) for r, c in column] for column in places]
    assert frames[1] == [RIGHT, WRONG] and frames[2][1] == RIGHT
    assert frames[0][0] == tuple(query[0, :, FRAME - 1, FRAME - 1].tolist())  # no frame, so it is the picture


def test_pictures_of_other_sizes_fill_their_cells() -> None:
    small, large = noise(1, 20), noise(1, 80)
    sheet = draw_sheet([("", "")], [Columns("", "", ("", ""), (small, large))], 40)
    enlarged = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
    assert find(np.asarray(sheet), enlarged[0]) is not None
