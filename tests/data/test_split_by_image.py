"""A split by image: training, validation and test share classes and no image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny, write_image
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dmml import Config, UserError, train
from ray_dmml.data.audit import audit
from ray_dmml.data.dataset import ImageSet, part_of_each_class
from ray_dmml.data.datasets import load_splits

SIZES = {"apple": 8, "pear": 9, "plum": 10, "fig": 8, "rare": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of at least 8 images, and one of 3."""
    folder = tmp_path_factory.mktemp("fruit")
    rng = np.random.default_rng(3)
    for hue, (name, size) in enumerate(SIZES.items()):
        for number in range(size):
            write_image(folder / name / f"{number}.png", rng, hue)
    return folder


def config_of(root: Path, **data: object) -> Config:
    raw = tiny(root, train={"steps": 2, "evaluate_every": 1})
    raw["data"] |= {"split_by": "image", "classes_per_batch": 3, "images_per_class": 2, **data}
    return Config.parse(raw)


def names_of(images: ImageSet | None) -> list[str]:
    assert images is not None
    return [images.source.name(i) for i in range(len(images))]


def num_held(size: int, fraction: float) -> int:
    """The rule, in words of its own: a share, at least 2 on either side, and nothing of a class that is too small."""
    if size < 4:
        return 0
    held = round(fraction * size)
    while held < 2:
        held += 1
    while size - held < 2:
        held -= 1
    return held


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.floats(0, 1),
    st.integers(0, 9),
    st.randoms(use_true_random=False),
)
def test_a_part_of_each_class(sizes: list[int], fraction: float, seed: int, random) -> None:
    """Each class gives as many as the rule says, whatever the order of the images; the folds together hold out all."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    random.shuffle(labels)

    def part(fold: int, generator: np.random.Generator | None) -> np.ndarray:
        return part_of_each_class(labels, fraction, generator, fold)

    for label, size in enumerate(sizes):
        held = num_held(size, fraction)
        for generator in (None, np.random.default_rng(seed)):
            assert part(0, generator)[labels == label].sum() == held
        if held:
            folds = [part(fold, np.random.default_rng(seed))[labels == label] for fold in range(-(-size // held))]
            assert np.any(folds, axis=0).all()
    last = part(0, None)
    for label, size in enumerate(sizes):
        kept = size - num_held(size, fraction)
        assert not last[labels == label][:kept].any() and last[labels == label][kept:].all()


def test_a_folder_is_split_within_its_classes(root: Path) -> None:
    """Every class of at least 4 images is in all three, the small one trains, and no image is in two."""
    splits = load_splits(config_of(root, validation_fraction=0.25).data)
    train_names, held, test = (names_of(part) for part in (splits.train, splits.validation, splits.test))
    assert sorted([*train_names, *held, *test]) == sorted(str(p.relative_to(root)) for p in root.glob("*/*.png"))
    assert Counter(name.split("/")[0] for name in test) == {"apple": 4, "pear": 4, "plum": 5, "fig": 4}
    assert Counter(name.split("/")[0] for name in held) == {"apple": 2, "pear": 2, "plum": 2, "fig": 2}
    assert Counter(name.split("/")[0] for name in train_names)["rare"] == 3
    assert splits.train.class_names == ("apple", "fig", "pear", "plum", "rare")
    assert [name for name in test if name.startswith("apple")] == [f"apple/{i}.png" for i in (4, 5, 6, 7)]


def test_the_split_follows_its_seeds(root: Path) -> None:
    """split_seed draws the test images and validation_seed the held-out ones; the run's seed draws neither."""

    def drawn(**data: object) -> tuple[list[str], list[str]]:
        splits = load_splits(config_of(root, **data).data)
        return names_of(splits.test), names_of(splits.validation)

    first = drawn(split_seed=1)
    assert first == drawn(split_seed=1) != drawn()
    assert drawn(split_seed=2)[0] != first[0]
    other = drawn(split_seed=1, validation_seed=1)
    assert other[0] == first[0] and other[1] != first[1]


def test_a_manifest_may_have_a_label_in_both_splits(root: Path, tmp_path: Path) -> None:
    """Its rows say which image is in which split; training images are held out within their classes."""
    lines = ["path,label,split"]
    for name in ("apple", "pear"):
        lines += [f"{name}/{i}.png,{name},{'train' if i < 5 else 'validation'}" for i in range(8)]
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    data = {"name": "manifest", "manifest": tmp_path / "photos.csv", "validation_fraction": 0.2}
    splits = load_splits(config_of(root, **data).data)
    assert splits.test is not None and splits.test.class_names == splits.train.class_names == ("apple", "pear")
    assert len(splits.test) == 6 and len(splits.train) == 6 and len(names_of(splits.validation)) == 4
    with pytest.raises(UserError, match=r"label 'apple' is in both splits .* unless data\.split_by is image"):
        load_splits(config_of(root, **data, split_by="class").data)


def test_data_check_counts_the_images_of_a_class_that_train(root: Path) -> None:
    """The few validation images of each class are no small class; the whole class is one bar of the histogram."""
    report = audit(config_of(root, validation_fraction=0.25).data)
    assert report.small_classes == []
    assert report.class_sizes == sorted(SIZES.values())
    report = audit(config_of(root, validation_fraction=0.25, images_per_class=3).data)
    assert {row["label"] for row in report.small_classes} == {"apple", "fig"}  # 2 of 8 train


def test_mistakes_are_named(root: Path, tmp_path: Path) -> None:
    """Classes that are too small, and a data set with test classes of its own."""
    for name in ("a", "b"):
        for number in range(3):
            write_image(tmp_path / name / f"{number}.png", np.random.default_rng(0), 1)
    with pytest.raises(UserError, match=r"needs 4 images of a class, 2 to train and 2 to test"):
        load_splits(config_of(tmp_path).data)
    with pytest.raises(UserError, match=r"at least 2 classes need 4 training images"):
        load_splits(config_of(root, train_fraction=0.3).data)
    with pytest.raises(UserError, match="split_by: image is for imagefolder and manifest"):
        Config.parse({"data": {"split_by": "image"}})


def test_the_results_say_that_the_classes_were_known(root: Path, tmp_path: Path) -> None:
    """results.json and the table of a run that is split by image."""
    from rich.console import Console

    from ray_dmml.loggers.results_tables import results_table

    results = train(config_of(root), tmp_path / "run", local=True)
    assert (results["split"], results["split_by"], results["num_images"]) == ("test", "image", 17)
    console = Console(width=100)
    with console.capture() as capture:
        results_table(results, console)
    assert "17 test images of 4 known classes" in capture.get() and "unseen" not in capture.get()
