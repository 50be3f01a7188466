"""Small batches on which a metric loss has to work before a run starts, so that its settings do not fail in mid-run."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ray_dmml.config.parts import describe
from ray_dmml.errors import UserError
from ray_dmml.randomness import seeded


def refuse_other_sizes(args: Mapping[str, Any], num_classes: int, embedding_size: int) -> None:
    """Raises UserError if the arguments of a metric loss state sizes that do not fit the data or the peer."""
    classes = args.get("num_classes")
    if isinstance(classes, int) and classes < num_classes:
        raise UserError(
            f"loss.metric.args.num_classes is {classes}, and there are {num_classes} training classes: leave it out"
        )
    for name in ("embedding_size", "descriptors_dim"):
        size = args.get(name)
        if isinstance(size, int) and size != embedding_size:
            raise UserError(
                f"loss.metric.args.{name} is {size}, and the embedding_size of a peer is {embedding_size}: leave it out"
            )


def rehearse(loss: nn.Module, num_classes: int, embedding_size: int) -> None:
    """Runs a loss forward and backward: the classes of the data, the size of the peer, an image twice.

    The loss is copied, so that its parameters, gradients and memory stay as they are.

    Raises:
        ValueError: the result is not a single finite number, or has a gradient that is not finite.
        Exception: whatever the loss raises.
    """
    classes = _some_classes(num_classes)
    labels = classes.repeat_interleave(4)
    _run(loss, _embeddings(len(labels), embedding_size), labels)
    twice = _embeddings(len(labels), embedding_size)
    twice[:2] = twice[4] = torch.eye(embedding_size)[0]  # whose cosine is exactly 1
    twice[6] = twice[5]
    _run(loss, twice, labels, "if a batch has an image twice")


def rehearse_small_classes(loss: nn.Module, num_classes: int, embedding_size: int) -> None:
    """The same with a batch whose classes have different numbers of images, one of them a single image.

    Raises as :func:`rehearse`.
    """
    classes = _some_classes(num_classes)
    labels = classes.repeat_interleave(torch.tensor([4, 3, 1, 2])[: len(classes)])
    _run(loss, _embeddings(len(labels), embedding_size), labels)


def _run(loss: nn.Module, embeddings: Tensor, labels: Tensor, when: str = "") -> None:
    loss = copy.deepcopy(loss)
    embeddings.requires_grad_()
    with seeded("rehearsal"):
        result = loss(embeddings, labels)
        if not (isinstance(result, Tensor) and result.ndim == 0):
            raise ValueError("the result is not a single number")
        _require_finite("value", result, when)
        if result.requires_grad:
            result.backward()
    require_plain_state(loss)
    for parameter in (embeddings, *loss.parameters()):
        if parameter.grad is not None:
            _require_finite("gradient", parameter.grad, when)


def require_plain_state(module: nn.Module) -> None:
    """Raises ValueError if a checkpoint with the module's state could not be loaded, because that might run code."""
    state = {key: value for key, value in module.state_dict().items() if not isinstance(value, Tensor)}
    try:
        torch.save(state, buffer := io.BytesIO())
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # whatever get_extra_state gives, or pickle raises
        reason = describe(error)
    else:
        return
    raise ValueError(f"get_extra_state may give tensors and plain values only, not {', '.join(state)} ({reason})")


def _require_finite(what: str, values: Tensor, when: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"its {what} is not finite {when}".rstrip())


def _some_classes(num_classes: int) -> Tensor:
    """Up to 4 classes, from the first to the last: proxies for fewer classes fail there."""
    return torch.linspace(0, num_classes - 1, 4).long().unique()


def _embeddings(number: int, size: int) -> Tensor:
    """(number, size) float32, rows of length 1 in random directions."""
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(number, size, generator=generator))
