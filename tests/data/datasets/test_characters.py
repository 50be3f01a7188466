"""The built-in characters."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import EXPERIMENTS

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.datasets import characters, load_splits


def listed() -> dict[int, int]:
    rows = (line.split() for line in characters.LIST.read_text().splitlines())
    return {int(code, 16): int(mask, 16) for code, mask in rows}


@pytest.mark.slow
def test_the_list_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the list again gives the one in the package.

    Other versions of FreeType move glyphs by fractions of a pixel, so a few of the many pairs of
    accented letters may fall on the other side of the look-alike threshold.
    """
    monkeypatch.syspath_prepend(EXPERIMENTS)
    from make_characters import choose_characters

    made, kept = choose_characters(), listed()
    assert len(made.keys() ^ kept.keys()) <= 0.01 * len(kept)
    assert all(made[code] == kept[code] for code in made.keys() & kept.keys())


def test_look_alikes_are_one_class():
    """Of Latin, Greek and Cyrillic twins only the lowest code point is a class; o and O are two."""
    kept = listed().keys()
    twins = {
        "A": (0x391, 0x410), "B": (0x392, 0x412), "E": (0x395, 0x415), "O": (0x39F, 0x41E),
        "P": (0x3A1, 0x420), "T": (0x3A4, 0x422), "o": (0x3BF, 0x43E), "-": (0x2010, 0x2011),
    }  # fmt: skip
    for latin, others in twins.items():
        assert ord(latin) in kept and kept.isdisjoint(others)
    assert kept.isdisjoint([0x20, 0xA0, 0x2003, 0x200B])  # blanks
    assert kept >= {ord(character) for character in "CcSsVvZz057&%Жжβ♥"}


def test_splits_are_large_disjoint_and_mixed():
    """Each side has hundreds of classes of 13 to 16 images and all scripts, and no class is in both."""
    splits = load_splits(DataConfig(decode_size=32, validation_fraction=0.25))
    sets = [splits.train, splits.validation, splits.test]
    names = [name for images in sets for name in images.class_names]
    assert len(names) == len(set(names)) == len(listed())
    assert splits.train.num_classes > 300 and splits.test.num_classes > 400
    assert splits.validation.num_classes == round(0.25 * (len(names) // 2))
    for images in sets:
        assert set(np.bincount(images.labels)) <= {13, 14, 15, 16}
        for script in ("LATIN", "GREEK", "CYRILLIC"):
            assert any(script in name for name in images.class_names)
    assert splits.test.query is None and splits.test.gallery is None


@pytest.mark.parametrize("size", [8, 48])
def test_glyphs_are_dark_on_light_and_centred(size):
    """Every glyph has ink, fits, is grey and lies in the middle to a pixel."""
    images, _ = characters.load(size)
    for index in range(0, len(images), 29):
        image = images.source.read(index)
        assert image.dtype == torch.uint8 and image.shape == (3, size, size)
        assert image.is_contiguous() and torch.equal(image[0], image[2])
        ink = (image[0] < 255).nonzero()
        assert len(ink)
        low, high = ink.amin(0), size - 1 - ink.amax(0)
        assert (low - high).abs().max() <= 1


def test_letters_of_one_face_have_one_scale():
    """A capital O is larger than a small o of the same face: glyphs do not fill their box."""
    face = characters.FACES.index("DejaVuSans")
    images = characters.CharacterImages([(ord("O"), face), (ord("o"), face)], 64)
    large, small = (int((images.read(i)[0] < 128).any(1).sum()) for i in range(2))
    assert large > 1.2 * small


def test_threads_read_the_same():
    """Eight threads at once read what one thread reads."""
    images, _ = characters.load(32)
    indices = list(range(0, len(images), 17))
    alone = [images.source.read(i) for i in indices]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(images.source.read, indices))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
