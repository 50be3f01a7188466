"""A view is what one net sees of an image: a peer's own augmentation, or the evaluation view.

Decoded uint8 images (3, S, S) in, uint8 images (3, H, H) out; scaling to the backbone's mean and
standard deviation belongs to the net. All draws come from torch's global generator, which the peer
seeds for the batch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ray_dmml.config.schema import Transform
from ray_dmml.errors import UserError

RESIZE_BEFORE_CROP = 256 / 224
"""The usual ratio of the resized side to the crop (Wu et al. 2017 and most since)."""

CPU = torch.device("cpu")

_ON_ANY_DEVICE = frozenset(
    {
        "CenterCrop",
        "ColorJitter",
        "GaussianBlur",
        "Pad",
        "RandomAffine",
        "RandomCrop",
        "RandomErasing",
        "RandomGrayscale",
        "RandomHorizontalFlip",
        "RandomPerspective",
        "RandomResizedCrop",
        "RandomRotation",
        "RandomVerticalFlip",
        "Resize",
    }
)
"""Tensors in and out, and parameters drawn on the CPU: the same draws wherever they are computed
(but for RandomErasing with random pixels). Others may need images of Pillow's, or on the CPU."""


def _presets(size: int) -> dict[str, list[Transform]]:
    flip = Transform(name="RandomHorizontalFlip")
    return {
        "weak": [
            Transform(name="Resize", args={"size": [round(size * RESIZE_BEFORE_CROP)] * 2}),
            Transform(name="RandomCrop"),
            flip,
        ],
        "standard": [Transform(name="RandomResizedCrop", args={"scale": [0.2, 1.0]}), flip],
        "strong": [
            Transform(name="RandomResizedCrop", args={"scale": [0.08, 1.0]}),
            flip,
            Transform(
                name="ColorJitter",
                args={"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
            ),
            Transform(name="RandomGrayscale", args={"p": 0.1}),
            Transform(name="RandomErasing", args={"p": 0.25}),
        ],
    }


class View:
    """Applies a pipeline to a batch.

    Args:
        pipeline: takes and gives uint8 (..., 3, H, W).
        size: H = W of what it must give.
        source: how to name it in an error.
        draws: it is random, so every image goes through it on its own and gets its own draws.
        device: where it is computed.

    Raises:
        UserError: tried on one image of ``decode_size``, it fails or gives another shape or type.
    """

    def __init__(
        self,
        pipeline: v2.Transform,
        size: int,
        decode_size: int,
        source: str,
        *,
        draws: bool,
        device: torch.device = CPU,
    ) -> None:
        self._pipeline, self._draws, self._device = pipeline, draws, device
        generator_state = torch.get_rng_state()
        black = torch.zeros(3, decode_size, decode_size, dtype=torch.uint8, device=device)
        try:
            result = pipeline(black)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"{source} does not work on decoded images of {decode_size} x {decode_size} px: {error}"
            ) from None
        finally:
            torch.set_rng_state(generator_state)
        given = type(result).__name__
        if isinstance(result, Tensor):
            given = f"{result.dtype} {tuple(result.shape)}"
        if given != f"torch.uint8 {(3, size, size)}":
            raise UserError(
                f"{source} gives {given}, but the net takes uint8 "
                f"{(3, size, size)}: end it with a crop or a Resize, and leave scaling and "
                "normalising to the net"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) anywhere -> uint8 (B, 3, H, H) on the view's device."""
        images = images.to(self._device, non_blocking=True)
        if not self._draws:
            return self._pipeline(images)
        return torch.stack([self._pipeline(image) for image in images])


def training_view(
    config: str | Sequence[Transform],
    size: int,
    decode_size: int,
    owner: str,
    device: torch.device = CPU,
) -> View:
    """The augmentation named or listed in the config, computed on ``device`` where all of its
    transforms can be, else on the CPU.

    Raises:
        UserError: an unknown transform (with the nearest right name), or settings it refuses.
    """
    transforms = _presets(size)[config] if isinstance(config, str) else config
    source = f"view of {owner}"
    built = [_build(transform, size, source) for transform in transforms]
    everywhere = all(transform.name in _ON_ANY_DEVICE for transform in transforms)
    return View(
        v2.Compose(built) if built else v2.Identity(),
        size,
        decode_size,
        source,
        draws=True,
        device=device if everywhere else CPU,
    )


def evaluation_view(size: int, crop: float, decode_size: int, device: torch.device = CPU) -> View:
    """Resize so that the centre crop keeps ``center_crop`` of the side: no draws."""
    resized = round(size / crop)
    pipeline = v2.Compose([v2.Resize([resized, resized]), v2.CenterCrop(size)])
    return View(pipeline, size, decode_size, "the evaluation view", draws=False, device=device)


def _build(transform: Transform, size: int, source: str) -> v2.Transform:
    known = {
        name: cls
        for name, cls in vars(v2).items()
        if inspect.isclass(cls) and issubclass(cls, v2.Transform) and cls is not v2.Transform
    }
    cls = known.get(transform.name)
    if cls is None:
        near = difflib.get_close_matches(transform.name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see torchvision.transforms.v2"
        raise UserError(f"{source}: unknown transform {transform.name!r}; {hint}")
    settings: dict[str, Any] = dict(transform.args)
    takes = inspect.signature(cls).parameters
    if "size" in takes and "size" not in settings:
        settings["size"] = [size, size]
    if isinstance(settings.get("interpolation"), str):
        try:
            settings["interpolation"] = InterpolationMode(settings["interpolation"])
        except ValueError:
            allowed = ", ".join(mode.value for mode in InterpolationMode)
            raise UserError(
                f"{source}: {transform.name} has no interpolation {settings['interpolation']!r}; "
                f"allowed: {allowed}"
            ) from None
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {transform.name} refuses its settings: {error}") from None
