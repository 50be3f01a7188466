"""A cohort whose parts are from a module outside the package: on Ray as in one process, and interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same, tiny, with_workers
from test_equality import continued, outcome, stored_at

from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.code import use_code
from ray_dmml.config.parts import load_parts
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits

STEPS = 6
SOURCE = Path(__file__).with_name("parts_source.py")


@pytest.fixture(scope="module")
def config(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Every kind of part that a peer has: a backbone, a view, a metric loss inside of a memory, mutual terms with and
    without parameters, and the data set. The memory of 30 embeddings is full after three batches."""
    module = tmp_path_factory.mktemp("outside") / "outside_parts.py"
    shutil.copy(SOURCE, module)
    raw = tiny(image_folder)
    raw["code"] = [str(module)]
    raw["data"] |= {"name": "outside_parts:reversed_folder", "args": {"num_test": 6}}
    raw["cohort"]["peers"] = [
        {"backbone": "outside_parts:Blocks", "backbone_args": {"width": 6}, "view": "outside_parts:Noise"},
        {
            "view": [{"name": "CenterCrop"}, {"name": "outside_parts:invert", "args": {"share": 0.5}}],
            "embedding_size": 9,
        },
    ]
    memory = {"memory_size": 30, "loss": {"name": "outside_parts:Pairs", "args": {"neg_margin": 0.7}}}
    terms = [{"name": f"outside_parts:{name}", "warmup_steps": n} for n, name in ((0, "Scaled"), (4, "similarities"))]
    raw["loss"] = {"metric": {"name": "CrossBatchMemory", "args": memory}, "mutual": terms}
    config = Config.parse(raw)
    load_parts(config)
    yield config
    use_code({})


@pytest.fixture(scope="module")
def local_outcome(config: Config) -> dict[str, Any]:
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        return outcome(cohort, stop=STEPS)


def test_the_parts_take_part(config: Config, local_outcome: dict[str, Any]) -> None:
    """The terms are in the rows, parameters have learned, and the memory is full."""
    rows = local_outcome["rows"]
    assert set(rows[0]["peer0"]) == {"loss", "metric", "distance", "angle", "Scaled"}  # the other one warms up
    assert set(rows[1]["peer1"]) == {"loss", "metric", "distance", "angle", "Scaled", "similarities"}
    state = local_outcome["state"]["peer0"]
    assert state["mutual"]["_with_state.0.scale"] != 1 and state["mutual"]["_with_state.0.count"] == STEPS
    assert state["metric"]["loss._extra_state"] == {"queue_idx": 12 * STEPS % 30, "has_been_filled": True}
    assert "backbone.layers.0.weight" in state["net"]
    assert len(local_outcome["test"]["peer0"]) == 6 * 5


def test_interrupted_equals_uninterrupted(config: Config, local_outcome: dict[str, Any]) -> None:
    """A memory that is partly filled or written over, and a term with a buffer."""
    for interrupted_at, stored in stored_at(config, (2, 5)).items():
        assert_same(continued(config, interrupted_at, stored, STEPS), local_outcome)


def test_ray_equals_in_process(ray_start_4_cpus: None, config: Config, local_outcome: dict[str, Any]) -> None:
    """The actors, and their view workers, have the file only by `code`, as it was when the run started: it is gone."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config.code[0].unlink()
    config = with_workers(config, 1, 1)
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        assert_same(outcome(cohort, stop=STEPS), local_outcome)
