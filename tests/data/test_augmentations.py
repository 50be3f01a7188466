"""Views: uint8 squares of the net's size, and new random numbers for each image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ray_dmml.config.code import read_code, use_code
from ray_dmml.config.schema import Transform
from ray_dmml.data.augmentations import evaluation_view, training_view
from ray_dmml.errors import UserError
from ray_dmml.randomness import seeded


@pytest.fixture
def images() -> Tensor:
    """(6, 3, 40, 40) uint8: the same noise six times."""
    one = torch.randint(0, 256, (1, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    return one.to(torch.uint8).repeat(6, 1, 1, 1)


@pytest.mark.parametrize("preset", ["weak", "standard", "strong"])
@pytest.mark.parametrize("size", [24, 40, 57])
def test_presets_fit_the_net(images: Tensor, preset: str, size: int) -> None:
    """Every preset gives (3, H, H) uint8, larger than the decoded image or smaller."""
    views = training_view(preset, size, 40, "peer0")(images)
    assert views.shape == (6, 3, size, size) and views.dtype == torch.uint8


@pytest.mark.parametrize("preset", ["weak", "standard", "strong"])
def test_every_image_has_draws_of_its_own(images: Tensor, preset: str) -> None:
    """Six copies of one image look different."""
    with seeded("test"):
        views = training_view(preset, 24, 40, "peer0")(images)
    assert len({image.numpy().tobytes() for image in views}) > 2


@pytest.mark.parametrize("preset", ["weak", "standard", "strong"])
def test_draws_follow_the_seed_alone(images: Tensor, preset: str) -> None:
    """A key gives the same result whatever was drawn before, and another key gives another result."""
    view = training_view(preset, 24, 40, "peer0")

    def under(*key: int | str) -> Tensor:
        torch.rand(3)
        with seeded(*key):
            return view(images)

    assert torch.equal(under(0, 1, 2, "view"), under(0, 1, 2, "view"))
    assert not torch.equal(under(0, 1, 2, "view"), under(0, 1, 3, "view"))


def test_building_a_view_draws_nothing() -> None:
    """The trial at construction leaves torch's generator where it was."""
    before = torch.get_rng_state()
    training_view("strong", 24, 40, "peer0")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_evaluation_view_draws_nothing(images: Tensor) -> None:
    """It is a resize to size / crop and a centre crop, written out here."""
    view = evaluation_view(28, 0.875, 40)
    before = torch.get_rng_state()
    views = view(images)
    assert torch.equal(torch.get_rng_state(), before)
    expected = F.resize(images, [32, 32], antialias=True)[:, :, 2:30, 2:30]
    assert torch.equal(views, expected)
    assert torch.equal(evaluation_view(40, 1.0, 40)(images), images)


def test_a_list_of_transforms_is_applied_in_order(images: Tensor) -> None:
    """Names and arguments are torchvision's, and `size` defaults to the net's."""
    listed = [
        Transform(name="CenterCrop", args={"size": 20}),
        Transform(name="Resize", args={"interpolation": "nearest"}),
        Transform(name="RandomInvert", args={"p": 1.0}),
    ]
    views = training_view(listed, 30, 40, "peer0")(images)
    expected = F.resize(images[:, :, 10:30, 10:30], [30, 30], interpolation=v2.InterpolationMode.NEAREST)
    assert torch.equal(views, 255 - expected)
    assert torch.equal(training_view([], 40, 40, "peer0")(images), images)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("RandomResizeCrop", {}, r"view of peer0: unknown transform .*did you mean RandomResizedCrop"),
        ("Qwertz", {}, r"unknown transform 'Qwertz'; see torchvision"),
        ("Transform", {}, "unknown transform 'Transform'"),
        ("functional", {}, "unknown transform 'functional'"),
        ("ColorJitter", {"brightness": -1}, r"ColorJitter refuses its arguments: .*non negative"),
        ("RandomErasing", {"probability": 1}, r"RandomErasing refuses its arguments: .*probability"),
        ("Resize", {"interpolation": "best"}, r"no interpolation 'best'; allowed: nearest"),
        ("CenterCrop", {"size": 10}, r"gives torch.uint8 \(3, 10, 10\), but the net takes .*24, 24"),
        ("Identity", {}, r"gives torch.uint8 \(3, 40, 40\)"),
        ("FiveCrop", {}, "gives tuple, but the net takes uint8"),
        ("ConvertImageDtype", {"dtype": "uint8"}, "does not work on decoded images"),
        ("RandomCrop", {"size": 99}, "does not work on decoded images of 40 x 40 px"),
        ("Normalize", {"mean": [0.5], "std": [0.5]}, "does not work on decoded images"),
        ("ToDtype", {"dtype": "float32"}, "view of peer0"),
    ],
)  # fmt: skip
def test_wrong_views_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    """Unknown names, wrong arguments and unusable outputs are errors of the user."""
    with pytest.raises(UserError, match=message):
        training_view([Transform(name=name, args=args)], 24, 40, "peer0")


# --- views of one's own ---------------------------------------------------------------------

OWN = """
import random
import numpy as np
import torch

class Noise:
    def __init__(self, size, strength=40):
        self.size, self.strength = size, strength

    def __call__(self, image):
        image //= 2
        drawn = np.random.randint(0, self.strength, image.shape, dtype=np.uint8)
        return (image + torch.from_numpy(drawn) + random.randint(0, 9))[:, :self.size[0], :self.size[1]]

def darker(image, by=2):
    return image // by

def floats(image):
    return image / 255

def broken(image):
    return image.no_such_method()
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[None]:
    """The module own_views."""
    (tmp_path / "own_views.py").write_text(OWN)
    use_code(read_code([tmp_path / "own_views.py"]))
    yield
    use_code({})


@pytest.mark.usefixtures("own")
def test_a_view_of_ones_own(images: Tensor) -> None:
    """Alone or beside torchvision's. It gets the size; all of its random numbers follow the seed, and differ between
    images; the decoded images, which other peers use as well, stay as they are."""
    listed = [
        Transform(name="own_views:Noise", args={"strength": 9}),
        Transform(name="own_views:darker", args={"by": 3}),
    ]
    before = images.clone()
    for config in ("own_views:Noise", [*listed, Transform(name="RandomHorizontalFlip")]):
        view = training_view(config, 24, 40, "peer0")
        with seeded("a"):
            first = view(images)
        with seeded("a"):
            assert torch.equal(view(images), first)
        with seeded("b"):
            assert not torch.equal(view(images), first)
        assert first.shape == (6, 3, 24, 24) and len({image.numpy().tobytes() for image in first}) == 6
        assert torch.equal(images, before)
    plain = training_view([*listed[1:], Transform(name="CenterCrop")], 24, 40, "peer0")
    assert torch.equal(plain(images), images[:, :, 8:32, 8:32] // 3)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_views:Noises", r"^view of peer0 'own_views:Noises': module own_views .*did you mean Noise"),
        ("own_views:darker", r"gives torch.uint8 \(3, 40, 40\), but the net takes uint8 \(3, 24, 24\)"),
        ("own_views:floats", r"gives torch.float32"),
        ("own_views:broken", r"^view of peer0 does not work .*AttributeError: .* at .*own_views.py, line 22"),
    ],
)
def test_mistakes_in_views_of_ones_own_are_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_view(name, 24, 40, "peer0")
