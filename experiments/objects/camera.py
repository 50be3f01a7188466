"""Images of objects, each from a random viewpoint in random light, by sphere tracing."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

from .dice import Dice
from .things import Thing
from .vectors import Floats, Vector, add, dot, rotation_of, scale, turn, unit

SIDE = 64
TURN = (0.3, 0.55, 0.15)
"""Tangents of half the largest turn about the axes to the right, up and to the camera: 33, 58 and 17 degrees."""

CAMERA = 4.0  # distance from the centre of an object, which is within a sphere of radius 1
FIELD = 0.235  # tangent of half the field of view
STEPS = 40  # of a ray, at most
NEAR = 0.004  # a ray so near has met the surface
SHADOW_STEPS = 12


def render(thing: Thing, dice: Dice) -> NDArray[np.uint8]:
    """An image of an object, (SIDE, SIDE, 3)."""
    rotation = rotation_of((1.0, *dice.vector(*TURN)))
    to_object = tuple(zip(*rotation, strict=True))  # its transpose
    field = FIELD / dice.between(0.8, 1.1)
    at = (np.arange(SIDE, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / SIDE) - 1
    shift = (dice.between(-0.12, 0.12), dice.between(-0.12, 0.12))
    right, down = np.meshgrid((at - shift[0]) * field, (at - shift[1]) * field)
    ray = turn(to_object, unit([right.ravel(), -down.ravel(), np.full(SIDE * SIDE, -1, np.float32)]))
    camera = turn(to_object, (0.0, 0.0, CAMERA))
    light = turn(to_object, unit((dice.between(-1, 1), dice.between(0.1, 1), dice.between(0.2, 1))))
    up = turn(to_object, (0.0, 1.0, 0.0))

    image = _background(dice).reshape(3, -1)
    hit, point = trace(thing, camera, ray)
    if len(hit):
        image[:, hit] = _shade(thing, point, [x[hit] for x in ray], light, up, dice)
    image = np.sqrt(np.clip(image, 0, 1)) + dice.noise(*image.shape) * dice.between(0.01, 0.04)
    pixels = np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels.reshape(3, SIDE, SIDE).transpose(1, 2, 0)


def _background(dice: Dice) -> Floats:
    """(3, SIDE, SIDE): two colours that blend."""
    share = dice.field(SIDE, 1 + dice.below(6))
    colours = [colorsys.hsv_to_rgb(dice.between(0, 1), dice.between(0, 0.4), dice.between(0.05, 0.8)) for _ in range(2)]
    return np.stack([one + (other - one) * share for one, other in zip(*colours, strict=True)])


def trace(thing: Thing, camera: Vector, ray: Vector) -> tuple[NDArray[np.intp], Vector]:
    """The indices of the rays that meet the surface, and the points where they do."""
    middle = -dot(camera, ray)  # nearest to the centre
    depth = 1.05 - (dot(camera, camera) - middle * middle)  # of the ray in the sphere around the object, squared
    left = np.flatnonzero(depth > 0)
    half = np.sqrt(depth[left])
    way, end = middle[left] - half, middle[left] + half
    hits, ways = [left[:0]], [way[:0]]
    for _ in range(STEPS):
        distance = thing.distance(add(camera, scale([x[left] for x in ray], way)))
        is_hit = distance < NEAR
        hits.append(left[is_hit])
        ways.append(way[is_hit])
        way = way + distance
        goes_on = ~is_hit & (way < end)
        left, way, end = left[goes_on], way[goes_on], end[goes_on]
        if not len(left):
            break
    hit, way = np.concatenate(hits), np.concatenate(ways)
    return hit, add(camera, scale([x[hit] for x in ray], way))


def _shade(thing: Thing, point: Vector, ray: Vector, light: Vector, up: Vector, dice: Dice) -> Floats:
    """Linear colours (3, N) of points on the surface."""
    corners = ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1))
    gradient: Vector = (0.0, 0.0, 0.0)
    for corner in corners:
        beside = thing.distance(add(point, scale(corner, 0.01)))
        gradient = add(gradient, scale(corner, beside))
    normal = unit(gradient)
    shadow, way = np.ones_like(point[0]), 0.05
    for _ in range(SHADOW_STEPS):
        free = thing.distance(add(add(point, scale(normal, 0.03)), scale(light, way)))
        shadow = np.minimum(shadow, np.clip(free * (6 / way), 0, 1))
        way *= 1.3
    direct = np.maximum(dot(normal, light), 0) * shadow * dice.between(0.7, 1.3)
    sky = (dot(normal, up) * 0.35 + 0.65) * dice.between(0.25, 0.55)
    shine = np.maximum(dot(normal, unit(add(light, scale(ray, -1)))), 0)
    for _ in range(4):
        shine = shine * shine
    warmth = dice.between(-0.12, 0.12)
    tint = (1 + warmth, 1.0, 1 - warmth)
    hue = dice.between(-0.12, 0.12)
    colour = turn(rotation_of((1.0, hue, hue, hue)), thing.colour(point))
    return np.stack(
        [t * (np.maximum(c, 0.02) * (direct + sky) + 0.25 * shine * shadow) for t, c in zip(tint, colour, strict=True)]
    )
