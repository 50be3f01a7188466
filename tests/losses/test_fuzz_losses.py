"""Any settings of a metric loss are used on any batch of a run, or refused with a UserError before it.

The test runs with a few examples, and, marked slow, with ``RAY_DMML_FUZZ_EXAMPLES`` (2000 unless set).
"""

from __future__ import annotations

import inspect
import os
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.losses.metric import MetricLoss
from ray_dmml.losses.rehearsal import rehearse_small_classes

FEW = 50
MANY = int(os.environ.get("RAY_DMML_FUZZ_EXAMPLES", "2000"))
NUM_CLASSES, SIZE = 6, 8


def classes(library: ModuleType) -> dict[str, type]:
    return {name: value for name, value in vars(library).items() if inspect.isclass(value)}


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 30), st.floats(-2, 2), st.text(max_size=4),
    st.sampled_from([0, 1, 0.5, 2**70, 1e30, 1e-30, float("nan"), float("inf"), "all", "cosine", NUM_CLASSES, SIZE]),
    st.lists(st.integers(-2, 9), max_size=2),
    st.dictionaries(st.sampled_from(["name", "args", "a"]), st.text(max_size=3)),
)  # fmt: skip
DISTANCES = st.sampled_from([*classes(distances), "x"]).map(lambda name: {"name": name})


@st.composite
def parts(draw: st.DrawFn, library: ModuleType) -> dict[str, Any]:
    """A class of the library with arguments of its own, and sometimes others."""
    name = draw(st.sampled_from([*classes(library), "x"]))
    known = inspect.signature(classes(library).get(name, dict)).parameters if name != "x" else {}
    names = [key for key in known if key not in ("kwargs", "args")]
    keys = st.sampled_from(names) if names else st.nothing()
    args = draw(st.dictionaries(keys | st.just("distance") | st.text(max_size=4), VALUES, max_size=2))
    if draw(st.integers(0, 3)) == 0:
        args["distance"] = draw(DISTANCES)
    return {"name": name, "args": args if draw(st.booleans()) else {}}


@st.composite
def metrics(draw: st.DrawFn) -> dict[str, Any]:
    metric = draw(parts(losses))
    if draw(st.integers(0, 2)) == 0:
        metric["miner"] = draw(parts(miners))
    if draw(st.integers(0, 2)) == 0:
        metric["reducer"] = draw(st.sampled_from([*classes(reducers), "x"]))
    return metric


BATCHES = st.tuples(
    st.lists(st.tuples(st.integers(0, NUM_CLASSES - 1), st.integers(1, 5)), min_size=2, max_size=6),
    st.integers(0, 2**20),  # seed of the embeddings
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3),  # equal images
)


def batch_of(drawn: Any) -> tuple[Tensor, Tensor]:
    """(B, 8) float32 at unit length, and labels with any number of images of a class."""
    sizes, seed, pairs = drawn
    labels = torch.cat([torch.full((number,), label) for label, number in sizes])
    x = F.normalize(torch.randn(len(labels), SIZE, generator=torch.Generator().manual_seed(seed)))
    for one, other in pairs:
        x[one % len(x)] = x[other % len(x)] = torch.eye(SIZE)[seed % SIZE] if seed % 2 else x[other % len(x)].clone()
    return x.requires_grad_(), labels


def is_used(metric: dict[str, Any], drawn: Any) -> bool:
    """Whether the settings are accepted; then they work on the batch."""
    x, labels = batch_of(drawn)
    try:
        config = Config.parse({"loss": {"metric": metric}})
        loss = MetricLoss(config.loss.metric, NUM_CLASSES, SIZE)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return False
    if len(set(labels.unique(return_counts=True)[1].tolist())) > 1:
        try:
            rehearse_small_classes(loss, NUM_CLASSES, SIZE)
        except Exception:  # training/run.py makes a UserError of it
            return False
    value = loss(x, labels)
    assert value.ndim == 0
    if value.requires_grad:
        value.backward()
    return True


@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_loss_on_any_batch(number: int) -> None:
    """Library classes by name, with arguments of any type and size; batches with small classes and equal images."""
    outcomes = set()

    @settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(metrics(), BATCHES)
    def run(metric: dict[str, Any], drawn: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.add(is_used(metric, drawn))

    run()
    assert outcomes == {True, False}
