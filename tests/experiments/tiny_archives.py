"""Tiny folders with the layout of the real archives, and settings that train on them in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
from conftest import write_image

PER_CLASS = 4
SMALL = [
    *("cohort.base.backbone=test_resnet", "cohort.base.weights=none", "cohort.base.num_gpus=0"),
    *("cohort.base.embedding_size=16", "cohort.base.input_size=32", "data.decode_size=36"),
    *("cohort.base.amp=off", "data.classes_per_batch=2", "data.images_per_class=2"),
    *("train.steps=2", "train.evaluate_every=1", "checkpoint.every_steps=1"),
]


def fill(root: Path, names: list[str], hue: int) -> None:
    rng = np.random.default_rng(hue)
    for name in names:
        write_image(root / name, rng, hue)


def make_cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    rows = []
    for hue, label in enumerate((1, 2, 3, 100, 101, 200)):
        names = [f"{label:03d}.Bird/{i}.png" for i in range(PER_CLASS)]
        fill(folder / "images", names, hue)
        rows += [(label, name) for name in names]
    images = "".join(f"{n} {name}\n" for n, (_, name) in enumerate(rows, 1))
    labels = "".join(f"{n} {label}\n" for n, (label, _) in enumerate(rows, 1))
    (folder / "images.txt").write_text(images)
    (folder / "image_class_labels.txt").write_text(labels)
    (folder / "classes.txt").write_text("".join(f"{n} {n:03d}.Bird\n" for n in range(1, 201)))


def make_cars(root: Path) -> None:
    rows = []
    for hue, label in enumerate((1, 2, 3, 98, 99, 196)):
        names = [f"car_ims/{label:03d}{i}.png" for i in range(PER_CLASS)]
        fill(root, names, hue)
        rows += [(name, label) for name in names]
    dtype = [("relative_im_path", object), ("class", object)]
    names = np.array([f"Car {n}" for n in range(1, 197)], dtype=object)
    annotations = np.array(rows, dtype=dtype)
    scipy.io.savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names})


def make_sop(root: Path) -> None:
    for file, labels in (("Ebay_train.txt", (1, 2, 3, 4)), ("Ebay_test.txt", (11319, 11320))):
        text = "image_id class_id super_class_id path\n"
        for hue, label in enumerate(labels):
            names = [f"chair_final/{label}_{i}.png" for i in range(PER_CLASS)]
            fill(root, names, hue)
            text += "".join(f"{10 * label + i} {label} 1 {name}\n" for i, name in enumerate(names))
        (root / file).write_text(text)


def make_inshop(root: Path) -> None:
    rows = []
    for hue, item in enumerate(range(1, 7)):
        names = [f"img/WOMEN/Dresses/id_{item:08d}/{i}_front.png" for i in range(PER_CLASS)]
        fill(root, names, hue)
        status = ["train"] * PER_CLASS if item <= 4 else ["query", *["gallery"] * (PER_CLASS - 1)]
        rows += [f"{name} id_{item:08d} {each}\n" for name, each in zip(names, status, strict=True)]
    text = f"{len(rows)}\nimage_name item_id evaluation_status\n" + "".join(rows)
    (root / "list_eval_partition.txt").write_text(text)


MAKE: dict[str, Callable[[Path], None]] = {
    "cub200": make_cub,
    "cars196": make_cars,
    "sop": make_sop,
    "inshop": make_inshop,
}
"""Writes the archive of a data set into a folder."""
