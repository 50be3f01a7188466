"""Primitives, by the distance from a point to their surface, and patterns on them.

Points are in the frame of the primitive, whose `size` is half its extent along each axis. A distance is negative
inside, and may be smaller than the true one. A pattern is the share of a second colour, from 0 to 1.
"""

from __future__ import annotations

import numpy as np

from .vectors import Floats, Triple, Vector, length


def ellipsoid(p: Vector, size: Triple) -> Floats:
    inside = length([x / s for x, s in zip(p, size, strict=True)])
    slope = length([x / (s * s) for x, s in zip(p, size, strict=True)])
    return inside * (inside - 1) / np.maximum(slope, 1e-6)


def box(p: Vector, size: Triple) -> Floats:
    rounding = 0.15 * min(size)
    x, y, z = (np.abs(x) - (s - rounding) for x, s in zip(p, size, strict=True))
    outside = length([np.maximum(x, 0), np.maximum(y, 0), np.maximum(z, 0)])
    return outside + np.minimum(np.maximum(np.maximum(x, y), z), 0) - rounding


def cylinder(p: Vector, size: Triple) -> Floats:
    across = np.sqrt(p[0] * p[0] + p[2] * p[2]) - size[0]
    along = np.abs(p[1]) - size[1]
    outside = np.sqrt(np.maximum(across, 0) ** 2 + np.maximum(along, 0) ** 2)
    return outside + np.minimum(np.maximum(across, along), 0)


def torus(p: Vector, size: Triple) -> Floats:
    thickness = 0.35 * min(size)
    ring = np.sqrt(p[0] * p[0] + p[2] * p[2]) - (size[0] - thickness)
    return np.sqrt(ring * ring + p[1] * p[1]) - thickness


def octahedron(p: Vector, size: Triple) -> Floats:
    x, y, z = (np.abs(x) / s for x, s in zip(p, size, strict=True))
    return (x + y + z - 1) * (min(size) * 0.577)


def plain(p: Vector) -> Floats:
    return np.zeros_like(p[0])


def stripes(p: Vector) -> Floats:
    return (p[1] - np.floor(p[1]) < 0.5).astype(np.float32)


def checks(p: Vector) -> Floats:
    return (np.floor(p[0]) + np.floor(p[1]) + np.floor(p[2])) % 2


def dots(p: Vector) -> Floats:
    return (length([x - np.floor(x) - 0.5 for x in p]) < 0.38).astype(np.float32)


def fade(p: Vector) -> Floats:
    return np.clip(p[1] * 0.5 + 0.5, 0, 1)


SHAPES = (ellipsoid, box, cylinder, torus, octahedron)
PATTERNS = (plain, plain, stripes, checks, dots, fade)
