"""Makes the folder of the grocery experiment from a clone of the public data set.

    git clone https://github.com/marcusklasson/GroceryStoreDataset
    python experiments/prepare_grocery.py GroceryStoreDataset FOLDER
    ray-dmml train --config experiments/configs/grocery.yaml --set data.root=FOLDER

Klasson, Zhang, Kjellström, *A Hierarchical Grocery Store Image Dataset with Visual and Semantic
Labels*, WACV 2019, https://arxiv.org/abs/1901.00711 (photos under the MIT licence). Each photo's
shorter side is resized to 128 px. FOLDER/grocery-128 gets one folder a class, with the names that
experiments/configs/grocery.csv lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageOps

SIDE = 128


def photos(clone: Path) -> list[tuple[Path, str]]:
    """The natural photos of a clone, each with its new path, CLASS/SPLIT_NAME.jpg."""
    root = clone / "dataset"
    if not root.is_dir():
        raise typer.BadParameter(f"{clone} is not a clone of GroceryStoreDataset: it has no folder dataset")
    photos = []
    for split in ("train", "val", "test"):
        for photo in sorted((root / split).rglob("*.jpg")):
            group = "__".join(photo.parent.relative_to(root / split).parts)
            photos.append((photo, f"{group}/{split}_{photo.name}"))
    return photos


def main(
    clone: Annotated[Path, typer.Argument(help="A clone of the public repository.")],
    folder: Annotated[Path, typer.Argument(help="Where grocery-128 is made; must not exist yet.")],
) -> None:
    """Resize the photos of the Grocery Store Dataset for the grocery experiment."""
    target = folder / "grocery-128"
    if target.exists():
        raise typer.BadParameter(f"{target} already exists")
    images = photos(clone)
    for photo, name in images:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(photo) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        scale = SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    print(f"{len(images)} photos in {target}")


if __name__ == "__main__":
    typer.run(main)
