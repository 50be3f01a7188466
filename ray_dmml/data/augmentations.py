"""Views of images: the augmentation of a peer, or the resize and crop of evaluation.

A view takes decoded uint8 images (3, S, S) and gives uint8 images (3, H, H), on the CPU. The net normalises them by the
mean and standard deviation of its backbone. All random numbers come from the global generators, which are seeded for
each batch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from ray_dmml.config.parts import describe, find_part, is_own, make_part, parameters_of, place_of
from ray_dmml.config.schema import VIEWS, PeerConfig, Transform
from ray_dmml.data.center_view import CenterView
from ray_dmml.errors import UserError

RESIZE_BEFORE_CROP = 256 / 224
"""The usual ratio of the resized side to the crop (Wu et al. 2017 and most since)."""


def _preset(name: str, size: int) -> list[Transform]:
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    presets: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "weak": [
            ("Resize", {"size": [round(size * RESIZE_BEFORE_CROP)] * 2}),
            ("RandomCrop", {}),
            ("RandomHorizontalFlip", {}),
        ],
        "standard": [("RandomResizedCrop", {"scale": [0.2, 1.0]}), ("RandomHorizontalFlip", {})],
        "strong": [
            ("RandomResizedCrop", {"scale": [0.08, 1.0]}),
            ("RandomHorizontalFlip", {}),
            ("ColorJitter", jitter),
            ("RandomGrayscale", {"p": 0.1}),
            ("RandomErasing", {"p": 0.25}),
        ],
    }
    return [Transform(name=name, args=args) for name, args in presets[name]]


class View:
    """Applies a pipeline to a batch.

    Args:
        pipeline: takes and gives uint8 (..., 3, H, W).
        size: H = W of its output.
        decode_size: S of its input.
        source: its name in an error.
        draws: it is random: it is applied to each image separately, with new random numbers.
        copies: it may change its input.

    Raises:
        UserError: it fails on a black image, or gives another shape or type.
    """

    def __init__(
        self,
        pipeline: nn.Module,
        size: int,
        decode_size: int,
        source: str,
        *,
        draws: bool,
        copies: bool = False,
    ) -> None:
        self.pipeline, self.size, self._draws, self._copies = pipeline, size, draws, copies
        generator_state = torch.get_rng_state()
        black = torch.zeros(3, decode_size, decode_size, dtype=torch.uint8)
        try:
            result = pipeline(black)
        except Exception as error:
            why = f"{describe(error)}{place_of(error)}" if copies else error
            raise UserError(
                f"{source} does not work on decoded images of {decode_size} x {decode_size} px: {why}"
            ) from error
        finally:
            torch.set_rng_state(generator_state)
        output = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        if output != f"torch.uint8 {(3, size, size)}":
            raise UserError(
                f"{source} gives {output}, but the net takes uint8 {(3, size, size)}: "
                "end it with a crop or a Resize, and leave scaling and normalising to the net"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> uint8 (B, 3, H, H)"""
        if not self._draws:
            return self.pipeline(images)
        # Peers in one process share the decoded images.
        return torch.stack([self.pipeline(image.clone() if self._copies else image) for image in images])


def views_of(peer: PeerConfig, size: int, own_crop: float, decode_size: int) -> tuple[View, View]:
    """The views of a peer: that of training, and that of evaluation.

    Args:
        size: side of the images that its net takes.
        own_crop: share of the side that the centre crop of its backbone keeps, unless the peer has another.
        decode_size: S of the decoded images.

    Raises:
        UserError: as :func:`training_view`.
    """
    crop = own_crop if peer.eval_crop is None else peer.eval_crop
    return training_view(peer.view, size, decode_size, str(peer.name)), evaluation_view(size, crop, decode_size)


def view_name(view: str | Sequence[Transform]) -> str:
    """A view in a few words, for people."""
    return view if isinstance(view, str) else "+".join(transform.name for transform in view) or "as decoded"


def training_view(config: str | Sequence[Transform], size: int, decode_size: int, owner: str) -> View:
    """The augmentation named or listed in the config.

    Raises:
        UserError: a transform is unknown (with the nearest known name) or refuses its arguments.
    """
    if isinstance(config, str):
        config = _preset(config, size) if config in VIEWS else [Transform(name=config)]
    transforms = config
    source = f"view of {owner}"
    built = [_build(transform, size, source) for transform in transforms]
    pipeline = v2.Compose(built) if built else v2.Identity()
    has_own = not all(type(part).__module__.startswith("torchvision.") for part in built)
    return View(pipeline, size, decode_size, source, draws=True, copies=has_own)


def evaluation_view(size: int, crop: float, decode_size: int) -> View:
    """A resize, and a centre crop that keeps the fraction ``crop`` of the side; nothing random."""
    pipeline = CenterView(size, round(size / crop), decode_size)
    return View(pipeline, size, decode_size, "the evaluation view", draws=False)


def _build(transform: Transform, size: int, source: str) -> Callable[..., Any]:
    transforms: dict[str, Any] = {
        name: cls for name, cls in vars(v2).items() if inspect.isclass(cls) and issubclass(cls, v2.Transform)
    }
    del transforms["Transform"]
    cls = transforms.get(transform.name)
    if cls is None and is_own(transform.name):
        takes_size = "size" in parameters_of(find_part(source, transform.name))
        args: dict[str, Any] = {"size": [size, size]} if takes_size else {}
        return make_part(source, transform.name, args | transform.args)
    if cls is None:
        near = difflib.get_close_matches(transform.name, transforms, n=3, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(near)}?" if near else "see torchvision.transforms.v2, or name your module:Class"
        )
        raise UserError(f"{source}: unknown transform {transform.name!r}; {hint}")
    args = dict(transform.args)
    if "size" in inspect.signature(cls).parameters:
        args.setdefault("size", [size, size])
    if isinstance(args.get("interpolation"), str):
        try:
            args["interpolation"] = InterpolationMode(args["interpolation"])
        except ValueError:
            allowed = ", ".join(mode.value for mode in InterpolationMode)
            raise UserError(
                f"{source}: {transform.name} has no interpolation {args['interpolation']!r}; allowed: {allowed}"
            ) from None
    try:
        return cls(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {transform.name} refuses its arguments: {error}") from None
