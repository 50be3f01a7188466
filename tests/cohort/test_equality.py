"""In this process, on Ray through the coordinator, on Ray directly: the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, state_of, tiny, unlike_peers, with_workers

from ray_dmml.checkpoint.peer_state import decode_peer
from ray_dmml.cohort.cohort import Cohort
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.losses.relational import relational_losses

STEPS = 14


def outcome(cohort: Cohort, start: int = 0, stop: int = STEPS) -> dict[str, Any]:
    """Everything a cohort has to show after some steps."""
    rows = cohort.run(start, stop, lambda finished: None)
    return {
        "rows": rows,
        "state": {name: decode_peer(files) for name, files in state_of(cohort).items()},
        "test": cohort.embeddings("test"),
        "ema": cohort.embeddings("validation", ema=True),
        "features": cohort.features("validation", cohort.names[1:]),
    }


Stored = tuple[list[Any], dict[str, Any]]
"""The rows of a cohort's steps so far, and its state."""


def stored_at(config: Config, steps: Sequence[int]) -> dict[int, Stored]:
    """What one cohort has after each of these steps."""
    rows: list[Any] = []
    found = {}
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        for start, stop in pairwise((0, *steps)):
            rows += cohort.run(start, stop, lambda finished: None)
            found[stop] = (list(rows), state_of(cohort))
    return found


def continued(config: Config, start: int, stored: Stored, stop: int = STEPS) -> dict[str, Any]:
    """The outcome of a fresh cohort that goes on from there."""
    rows, state = stored
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        cohort.load(state)
        found = outcome(cohort, start, stop)
    return {**found, "rows": rows + found["rows"]}


def run_locally(config: Config) -> dict[str, Any]:
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        return outcome(cohort)


@pytest.fixture(scope="module")
def local_outcome(image_folder: Path) -> dict[str, Any]:
    """Every image decoded at every use; the actors read through the cache."""
    return run_locally(unlike_peers(image_folder, data={"cache_gib": 0}))


@pytest.mark.parametrize("transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)])
def test_ray_equals_in_process(
    ray_start_4_cpus: None, image_folder: Path, local_outcome: dict[str, Any], transport: str
) -> None:
    """3 unlike peers end with the same weights, optimiser state, losses and embeddings on Ray
    actors as in one process, to the bit, whichever way the embeddings went and whoever made the views."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = with_workers(unlike_peers(image_folder), 0, 1, 2)
    cohort_config = config.cohort.model_copy(update={"transport": transport})
    config = config.model_copy(update={"cohort": cohort_config})
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        assert cohort.transport == transport
        assert_same(outcome(cohort), local_outcome)


@pytest.mark.parametrize("transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)])
def test_ray_equals_in_process_with_few_teachers(ray_start_4_cpus: None, image_folder: Path, transport: str) -> None:
    """4 peers of unlike, also odd embedding sizes that learn from 2 others each, drawn again at every step, by terms
    with each as a teacher and by terms with one ensemble; embeddings of several blocks; micro batches."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    loss = {
        "relational": {"teacher": "ensemble", "normalize": False},
        "similarity": {"weight": 0.1, "decay_until": 4},
        "relaxed_contrastive": {"weight": 0.2, "teacher": "ensemble"},
    }
    raw = tiny(image_folder, data={"classes_per_batch": 5, "images_per_class": 5, "micro_batch": 8}, loss=loss)
    raw["cohort"] |= {"max_teachers": 2, "transport": transport}
    sizes = (2000, 15, 701, 3)
    raw["cohort"]["peers"] = [{"embedding_size": size} for size in sizes]
    config = Config.parse(raw)
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        expected = outcome(cohort, stop=5)
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        assert cohort.transport == transport
        assert_same(outcome(cohort, stop=5), expected)


def test_two_runs_of_one_seed_are_equal_of_two_seeds_are_not(image_folder: Path, local_outcome: dict[str, Any]) -> None:
    """The run's seed decides everything; another one changes draws and initial weights."""
    assert_same(run_locally(unlike_peers(image_folder)), local_outcome)
    other = run_locally(unlike_peers(image_folder, seed=1))
    assert other["rows"][0] != local_outcome["rows"][0]
    for name, state in local_outcome["state"].items():
        assert not (other["state"][name]["net"]["head.weight"] == state["net"]["head.weight"]).all()


INTERRUPTED_AT = (1, 2, 3, 7, 12)
"""Peers update at every step, every second and every third: some have gradients of earlier steps, and some not."""


@pytest.fixture(scope="module")
def stored(image_folder: Path) -> dict[int, Stored]:
    return stored_at(unlike_peers(image_folder), INTERRUPTED_AT)


@pytest.mark.parametrize("interrupted_at", INTERRUPTED_AT)
def test_interrupted_equals_uninterrupted(
    image_folder: Path, stored: dict[int, Stored], local_outcome: dict[str, Any], interrupted_at: int
) -> None:
    """A cohort that is stored after any step, half-accumulated gradients and all, and put into a
    fresh one goes on to the same bits."""
    assert_same(continued(unlike_peers(image_folder), interrupted_at, stored[interrupted_at]), local_outcome)


def test_mutual_weights_of_zero_equal_separate_runs(image_folder: Path) -> None:
    """Without the mutual term a cohort is M separate runs of the same peers, to the bit: random
    numbers follow the peer, not its position."""
    loss = {"relational": {"distance_weight": 0, "angle_weight": 0}}
    together = unlike_peers(image_folder, loss=loss)
    joint = run_locally(together)
    for peer in together.cohort.peers:
        alone = together.model_copy(update={"cohort": together.cohort.model_copy(update={"peers": (peer,)})})
        single = run_locally(alone)
        name = str(peer.name)
        assert_same(single["state"][name], joint["state"][name], name)
        assert_same([row[name] for row in single["rows"]], [row[name] for row in joint["rows"]])


def test_removing_a_peer_changes_nothing_but_the_mutual_term(image_folder: Path) -> None:
    """The first step's metric losses of the peers that are left are those they had before."""
    config = unlike_peers(image_folder)
    splits = load_splits(config.data)
    with closing(LocalCohort(config, splits)) as cohort:
        before = cohort.run(0, 1, lambda finished: None)[0]
    fewer = config.cohort.model_copy(update={"peers": config.cohort.peers[1:]})
    with closing(LocalCohort(config.model_copy(update={"cohort": fewer}), splits)) as cohort:
        after = cohort.run(0, 1, lambda finished: None)[0]
    assert after["peer2"]["metric"] == before["peer2"]["metric"]
    assert after["peer2"]["distance"] != before["peer2"]["distance"]


def test_a_mutual_cohort_agrees_on_one_geometry(image_folder: Path) -> None:
    """With a strong mutual term the peers end with the same relative distances; apart they do not."""

    def disagreement(weight: float) -> float:
        loss = {"relational": {"distance_weight": weight, "angle_weight": weight, "normalize": True}}
        config = Config.parse(tiny(image_folder, loss=loss))
        with closing(LocalCohort(config, load_splits(config.data))) as cohort:
            cohort.run(0, 40, lambda finished: None)
            one, other = cohort.embeddings("train").values()
        return float(relational_losses(torch.from_numpy(one), [torch.from_numpy(other)]).distance)

    assert disagreement(20.0) < 0.5 * disagreement(0.0)
