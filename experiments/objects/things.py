"""Random objects of a few primitives."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .dice import Dice
from .shapes import PATTERNS, SHAPES
from .vectors import Floats, Rotation, Triple, Vector, add, length, rotation_of, scale, turn, unit

NUM_PALETTES, COLOURS = 12, 4


@dataclass(frozen=True)
class Part:
    """A primitive. Its surface has two colours, in a pattern with so many periods along its axes."""

    shape: Callable[[Vector, Triple], Floats]
    centre: Triple
    rotation: Rotation
    size: Triple  # half of its extent along each axis
    colours: tuple[Triple, Triple]
    pattern: Callable[[Vector], Floats]
    periods: float

    def place(self, point: Vector) -> Vector:
        """Points in the object's frame -> in the part's."""
        return turn(self.rotation, add(point, scale(self.centre, -1)))


@dataclass(frozen=True)
class Thing:
    """An object. Its parts are within the unit sphere."""

    parts: list[Part]
    is_mirrored: bool  # the half x > 0 is repeated on the other side
    softness: float  # width of the seams between parts

    def fold(self, point: Vector) -> Vector:
        return [np.abs(point[0]), *point[1:]] if self.is_mirrored else point

    def distance(self, point: Vector) -> Floats:
        """At most the distance to the surface, (N,); negative inside."""
        point = self.fold(point)
        total: Floats | None = None
        for part in self.parts:
            one = part.shape(part.place(point), part.size)
            if total is None:
                total = one
            else:
                seam = np.maximum(self.softness - np.abs(total - one), 0)
                total = np.minimum(total, one) - seam * seam * (0.25 / self.softness)
        assert total is not None
        return total

    def colour(self, point: Vector) -> Floats:
        """Colours (3, N) of points on the surface: those of the nearest part."""
        point = self.fold(point)
        places = [part.place(point) for part in self.parts]
        nearest = np.argmin([p.shape(x, p.size) for p, x in zip(self.parts, places, strict=True)], axis=0)
        colour = np.zeros((3, len(nearest)), np.float32)
        for index, (part, place) in enumerate(zip(self.parts, places, strict=True)):
            own = nearest == index
            share = part.pattern([x[own] * part.periods for x in place])
            for channel, (one, other) in enumerate(zip(*part.colours, strict=True)):
                colour[channel, own] = one + (other - one) * share
        return colour


def make_palette(dice: Dice) -> list[Triple]:
    """Linear colours: two of neighbouring hues, one of the opposite hue, and a grey."""
    hue = dice.between(0, 1)
    return [
        colorsys.hsv_to_rgb(hue, dice.between(0.5, 0.9), dice.between(0.4, 0.8)),
        colorsys.hsv_to_rgb(hue + dice.between(0.08, 0.2), dice.between(0.4, 0.9), dice.between(0.3, 0.8)),
        colorsys.hsv_to_rgb(hue + dice.between(0.4, 0.6), dice.between(0.3, 0.8), dice.between(0.2, 0.7)),
        colorsys.hsv_to_rgb(hue, dice.between(0.0, 0.15), (0.06, 0.25, 0.7)[dice.below(3)]),
    ]


def make_thing(dice: Dice) -> Thing:
    """A random object."""
    palette = make_palette(Dice("palette", dice.below(NUM_PALETTES)))
    parts: list[Part] = []
    for _ in range(3 + dice.below(4)):
        whole = dice.between(0.3, 0.6)
        size = (whole * dice.between(0.45, 1), whole * dice.between(0.45, 1), whole * dice.between(0.45, 1))
        centre = (0.0, 0.0, 0.0)
        if parts:  # it touches an earlier part
            other = parts[dice.below(len(parts))]
            reach = 0.6 * (max(other.size) + max(size))
            centre = add(other.centre, scale(unit(dice.vector()), reach))
        first = dice.below(COLOURS)
        second = (first + 1 + dice.below(COLOURS - 1)) % COLOURS
        parts.append(
            Part(
                shape=SHAPES[dice.below(len(SHAPES))],
                centre=centre,
                rotation=rotation_of((dice.between(0.2, 1), *dice.vector())),
                size=size,
                colours=(palette[first], palette[second]),
                pattern=PATTERNS[dice.below(len(PATTERNS))],
                periods=dice.between(2.5, 6),
            )
        )
    is_mirrored = dice.below(2) == 1
    return Thing(_into_unit_sphere(parts, is_mirrored), is_mirrored, softness=dice.between(0.02, 0.15))


def _into_unit_sphere(parts: list[Part], is_mirrored: bool) -> list[Part]:
    """The parts moved and resized, so that the mirror, if any, stays at x = 0."""
    centres = [(abs(part.centre[0]), *part.centre[1:]) if is_mirrored else part.centre for part in parts]
    middle = scale(functools.reduce(add, centres), -1 / len(centres))
    if is_mirrored:
        middle = (0.0, *middle[1:])
    centres = [add(centre, middle) for centre in centres]
    radius = max(length(centre) + length(part.size) for centre, part in zip(centres, parts, strict=True))
    return [
        replace(part, centre=scale(centre, 1 / radius), size=scale(part.size, 1 / radius))
        for part, centre in zip(parts, centres, strict=True)
    ]
