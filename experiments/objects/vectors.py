"""Vectors of numbers, or of arrays with one entry a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Triple = tuple[float, float, float]
Rotation = tuple[Triple, Triple, Triple]
Vector = Sequence[Floats] | Triple
"""x, y and z: three arrays of one shape (N,), or three numbers."""


def dot(a: Vector, b: Vector) -> Floats | float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def length(vector: Vector) -> Floats | float:
    square = dot(vector, vector)
    # A number stays Python's: numpy's are float64 and would make float64 of arrays.
    return math.sqrt(square) if isinstance(square, float) else np.sqrt(square)


def unit(vector: Vector) -> Vector:
    return scale(vector, 1 / length(vector))


def add(a: Vector, b: Vector) -> Vector:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def scale(vector: Vector, factor: Floats | float) -> Vector:
    return tuple(x * factor for x in vector)


def turn(rotation: Rotation, point: Vector) -> Vector:
    return tuple(dot(row, point) for row in rotation)


def rotation_of(quaternion: tuple[float, float, float, float]) -> Rotation:
    """Rotation of a quaternion (w, x, y, z), which may have any length but 0."""
    w, x, y, z = quaternion
    size = math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / size, x / size, y / size, z / size
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
