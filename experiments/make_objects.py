"""Renders the images of the ablation on objects: 200 random 3-D objects, 20 images of each.

    python experiments/make_objects.py FOLDER
    ray-dmml train --config experiments/ablations/objects/config.yaml --set data.root=FOLDER

A class is one object, as in retrieval of products. An object joins three to six primitives (ellipsoids,
boxes, cylinders, tori and octahedra) and may be mirrored. Each primitive has a pattern of two colours.
There are twelve palettes of four colours, so that several objects have the same colours. Viewpoint,
scale, position, light, hue, background and noise differ from image to image.

The images have the same pixels on every machine, which the script verifies. It therefore uses only what
IEEE 754 rounds in one way: sums, products, quotients and square roots of single numbers, but no sines
and no matrix products.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer
from objects.camera import render
from objects.dice import Dice
from objects.things import make_thing
from PIL import Image

NUM_CLASSES, IMAGES_PER_CLASS = 200, 20
DIGEST = "6e5f5890c36180ef2a8e4ac9594f7dba56498d57fbcff37bce9a47a5fce7e2da"
"""SHA-256 of all pixels."""


def write(folder: Path, num_classes: int = NUM_CLASSES, images_per_class: int = IMAGES_PER_CLASS) -> str:
    """Writes FOLDER/object-CLASS/NUMBER.png; returns the digest of all pixels."""
    digest = hashlib.sha256()
    for index in range(num_classes):
        target = folder / f"object-{index:03d}"
        target.mkdir(parents=True)
        thing = make_thing(Dice("thing", index))
        for number in range(images_per_class):
            pixels = render(thing, Dice("image", index, number))
            digest.update(pixels.tobytes())
            Image.fromarray(pixels).save(target / f"{number:02d}.png")
    return digest.hexdigest()


def main(folder: Annotated[Path, typer.Argument(help="Where the images are written; must not exist yet.")]) -> None:
    """Render the objects of the ablation: 200 classes of 20 images."""
    if folder.exists():
        raise typer.BadParameter(f"{folder} already exists")
    digest = write(folder)
    if digest != DIGEST:
        raise SystemExit(f"the images in {folder} have the digest {digest}, not {DIGEST}")
    print(f"{NUM_CLASSES * IMAGES_PER_CLASS:,} images of {NUM_CLASSES} objects in {folder}, digest {digest[:12]}")


if __name__ == "__main__":
    typer.run(main)
