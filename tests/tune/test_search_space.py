"""What may be searched. All of it is checked before a trial runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from tune_helpers import ANGLE

from ray_dmml.config.loading import QUICKSTART, read_settings
from ray_dmml.errors import UserError
from ray_dmml.tune.search_space import Search, SearchConfig, load_search


def search(raw: dict[str, Any], space: dict[str, Any], **settings: Any) -> Search:
    return Search(raw, SearchConfig.model_validate({"space": space, **settings}))


def test_trials_do_not_stop_by_themselves(raw: dict[str, Any]) -> None:
    """The scheduler decides how long a trial trains, and all trials are compared at the same steps."""
    raw["train"]["early_stopping"] = 2
    assert search(raw, {ANGLE: {"uniform": [0, 4]}}).trial_config({}).train.early_stopping is None
    with pytest.raises(UserError, match=r"train\.early_stopping.*the search sets it"):
        search(raw, {"train.early_stopping": {"choice": [1, 2]}})


def test_trials_have_the_images_of_the_final_runs(raw: dict[str, Any]) -> None:
    raw["data"] |= {"name": "own_data:images", "args": {"part": 1}}
    with pytest.raises(UserError, match=r"data\.args must keep the config's value: .* use the same images"):
        search(raw, {"data.args.part": {"choice": [1, 2]}})


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder)


def test_the_built_in_search_is_of_the_quickstart() -> None:
    """Its baseline is the unchanged quickstart. It varies weights, seeds, updates and views."""
    built_in = Search(read_settings(QUICKSTART), load_search())
    assert built_in.config_of(built_in.baseline) == built_in.base
    assert {key.rsplit(".", 1)[-1] for key in built_in.config.space} >= {
        "distance_weight",
        "angle_weight",
        "init_seed",
        "update_interval",
        "view",
    }
    config = built_in.trial_config(built_in.baseline)
    assert config.train.steps == config.checkpoint.every_steps * 4 == 100
    assert config.evaluation.split == "validation"
    assert config.cohort.peers[0].schedule.steps == 100


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.relational.distnce": {"uniform": [0, 2]}}, r"relational\.distnce: .*did you mean 'distance_weight'"),
        ({ANGLE: {"uniform": [-1, 4]}}, r"relational\.angle_weight: -1.0: .*greater than or equal to 0"),
        ({"cohort.peers.1.backbone": {"choice": ["test_resnet", 7]}}, r"space\.cohort\.peers\.1\.backbone: 7"),
        ({"data.validation_fraction": {"choice": [0.4, 0]}}, r"data\.validation_fraction must keep .* same classes"),
        ({"data.split_seed": {"choice": [None, 3]}}, r"data\.split_seed: 3: .* final runs are tested on"),
        ({"evaluation.recall_at": {"choice": [[1, 2], [1]]}}, r"evaluation\.recall_at must keep .* evaluated alike"),
        ({"train.evaluate_every": {"choice": [2, 1]}}, r"train\.evaluate_every must keep .* same steps"),
        ({"data.validation_fold": {"integer": [0, 1]}}, r"data\.validation_fold must keep .* search sets it"),
        # A fraction between the limits is checked as well.
        ({"cohort.peers.1.update_interval": {"uniform": [1, 4]}}, r"update_interval: 1\.95.*: .*valid integer"),
        ({"loss.relational.warmup_steps": {"uniform": [0, 100]}}, r"warmup_steps: 31\.8.*: .*valid integer"),
        ({"cohort.peers.5.seed": {"integer": [0, 3]}}, r"cohort\.peers has entries 0 to 1"),
        ({"loss.relational.distance_weight": {"uniform": [2, 4]}}, r"own value 1.0 is not from 2 to 4"),
        ({"cohort.peers.1.view": {"choice": ["standard", "strong"]}}, "own value is none of standard, strong"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused(raw: dict[str, Any], space: dict[str, Any], message: str) -> None:
    """Unknown settings, values that a config refuses, and a space without the baseline."""
    with pytest.raises(UserError, match=message):
        search(raw, space)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: {seed: {choice: [0], uniform: [0, 1]}}", "give one of choice, uniform, .* not 2"),
        ("space: {seed: {uniform: [2, 1]}}", "the lower one first"),
        ("space: {seed: {loguniform: [0, 1]}}", "above 0"),
        ("space: {}", "at least 1 item"),
        ("space: {seed: {logunifrom: [1, 2]}}", "did you mean 'loguniform'"),
        ("objectiv: ensemble\nspace: {seed: {choice: [0]}}", "objectiv: unknown setting; did you mean 'objective'"),
        ("seed: -1\nspace: {seed: {choice: [0]}}", "seed: .*greater than or equal to 0"),
        ("folds: 2\nspace: {seed: {choice: [0]}}", "folds: 2 needs scheduler: none"),
        ("seeds: 2\nspace: {seed: {choice: [0]}}", "seeds: 2 needs scheduler: none"),
        ("seeds: 0\nspace: {seed: {choice: [0]}}", "seeds: .*greater than or equal to 1"),
        ("scheduler: pbt\nspace: {seed: {choice: [0]}}", "scheduler: Input should be 'asha' or 'none'"),
        ("- space", "must hold settings"),
        ("space: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_search_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The message has the place and what is allowed."""
    (tmp_path / "search.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_search(tmp_path / "search.yaml")
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_search(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trial": {ANGLE: 3}}, r"trial\.loss\.relational\.angle_weight replaces the samples"),
        ({"trial": {"loss": {}}}, r"trial\.loss replaces the samples of space\.loss\.relational\.angle_weight"),
        ({"trial": {"data.validation_fraction": 0}}, "data.validation_fraction above 0"),
        ({"trial": {"data.validation_fraction": 0.5}, "folds": 3, "scheduler": "none"}, "0.5 gives at most 2"),
        ({"trial": {"data.train_fraction": 0.9}}, r"trial: data\.train_fraction must keep .* are tested on"),
        ({"trial": {"evaluation.recall_at": [1]}}, r"trial: evaluation\.recall_at must keep"),
        ({"trial": {"checkpoint.storage_path": "there"}}, r"trial: checkpoint\.storage_path must keep"),
    ],
)  # fmt: skip
def test_settings_of_the_trials_that_undo_the_search_are_refused(
    raw: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    """Samples without effect, no validation classes, and folds that would overlap."""
    space = {ANGLE: {"uniform": [0, 4]}}
    assert search(raw, space, trial={"train.steps": 2}).baseline == {ANGLE: 2.0}
    with pytest.raises(UserError, match=message):
        search(raw, **{"space": space, **settings})


def test_trials_hold_out_the_classes_that_the_config_does(raw: dict[str, Any]) -> None:
    """Folds begin at the first."""
    space = {ANGLE: {"uniform": [0, 4]}}
    raw["data"]["validation_fold"] = 2
    assert search(raw, space).trial_config({}).data.validation_fold == 2
    with pytest.raises(UserError, match=r"leave out data\.validation_fold"):
        search(raw, space, folds=2, scheduler="none")
    del raw["data"]["validation_fold"]
    two_folds = search(raw, space, folds=2, scheduler="none")
    assert [two_folds.trial_config({}, n).data.validation_fold for n in (0, 1)] == [0, 1]


def test_a_trial_has_a_run_for_each_fold_and_seed(raw: dict[str, Any]) -> None:
    """Seeds count from the config's own. The folds hold out the same classes with every seed."""
    raw["seed"] = 5
    found = search(raw, {ANGLE: {"uniform": [0, 4]}}, folds=2, seeds=3, scheduler="none")
    assert found.runs == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    configs = [found.trial_config({}, *run) for run in found.runs]
    assert [config.seed for config in configs] == [5, 6, 7, 5, 6, 7]
    assert [config.data.validation_fold for config in configs] == [0, 0, 0, 1, 1, 1]
    assert search(raw, {ANGLE: {"uniform": [0, 4]}}).runs == [(0, 0)]


@pytest.mark.parametrize(("reports", "own", "expected"), [(6, 0, 6), (6, 2, 2), (6, 4, 6), (6, 12, 6), (0, 3, 3)])
def test_trials_have_a_checkpoint_at_each_report_and_where_the_config_has_one(
    raw: dict[str, Any], reports: int, own: int, expected: int
) -> None:
    """A trial that reports only at its end is not lost with its process."""
    raw["train"] |= {"steps": 12, "evaluate_every": reports}
    raw["checkpoint"]["every_steps"] = own
    found = search(raw, {ANGLE: {"uniform": [0, 4]}})
    assert found.trial_config({}).checkpoint.every_steps == expected


def test_the_baseline_is_the_config_if_a_peer_states_its_own_value(raw: dict[str, Any]) -> None:
    """A value of the base is that of the peers that state none. Settings that replace each other are
    refused."""
    raw["cohort"]["base"]["optimizer"] = {"lr": 1e-3}
    raw["cohort"]["peers"] = [{"optimizer": {"lr": 1e-4}}, {}]
    found = search(raw, {"cohort.base.optimizer.lr": {"loguniform": [1e-5, 1e-2]}})
    assert found.baseline == {"cohort.base.optimizer.lr": 1e-3}
    assert found.config_of(found.baseline) == found.base
    # Each alone is allowed. Together, the peers' leave nothing for the base to set.
    raw["cohort"]["peers"] = [{}, {}]
    places = ("peers.0", "peers.1", "base")
    own = found.base.cohort.peers[1].view
    with pytest.raises(UserError, match="view"):
        search(raw, {f"cohort.{place}.view": {"choice": ["weak", own]} for place in places})


def test_every_kind_of_setting_can_be_searched(raw: dict[str, Any]) -> None:
    """Numbers, names, lists of transforms, whole cohorts; the base for all peers at once."""
    views = [[{"name": "CenterCrop"}], "weak"]
    cohorts = [raw["cohort"]["peers"], [{}, {}, {"update_interval": 2}]]
    found = search(
        raw,
        {
            "cohort.peers": {"choice": cohorts},
            "cohort.base.optimizer.lr": {"loguniform": [1e-4, 1e-2]},
            "loss.relational.warmup_steps": {"integer": [0, 9]},
            "cohort.base.view": {"choice": ["standard", *views]},
        },
        metric="map@r",
        objective="best_peer",
    )
    assert found.config_of(found.baseline) == found.base
    config = found.config_of(
        {
            "cohort.peers": json.dumps(cohorts[1]),
            "cohort.base.optimizer.lr": 2e-3,
            "loss.relational.warmup_steps": 4,
            "cohort.base.view": json.dumps(views[0]),
        }
    )
    assert len(config.cohort.peers) == 3
    assert [peer.optimizer.lr for peer in config.cohort.peers] == [2e-3] * 3
    assert [peer.view[0].name for peer in config.cohort.peers] == ["CenterCrop"] * 3  # type: ignore[union-attr]
    assert config.loss.relational.warmup_steps == 4
    figures = {"peers": {"a": {"map@r": 0.25}, "b": {"map@r": 0.5}}, "ensemble": {"map@r": 0.75}}
    assert found.objective(figures, ("a", "b")) == 0.5


@pytest.mark.parametrize(("objective", "value"), [("mean_peer", 0.375), ("best_peer", 0.5), ("ensemble", 0.75)])
def test_frozen_peers_are_no_objective(raw: dict[str, Any], objective: str, value: float) -> None:
    """Their figures are the same in every trial. They are in the ensemble."""
    frozen = {"name": "c", "frozen": True, "weights": "c.safetensors"}
    raw["cohort"]["peers"] = [{"name": "a"}, {"name": "b"}, frozen]
    figures = {"peers": {name: {"map@r": value} for name, value in (("a", 0.25), ("b", 0.5), ("c", 1.0))}}
    found = search(raw, {ANGLE: {"uniform": [0, 4]}}, metric="map@r", objective=objective)
    assert found.objective({**figures, "ensemble": {"map@r": 0.75}}, found.base.cohort.learners) == value


def test_a_search_needs_validation_classes_and_a_known_metric(raw: dict[str, Any]) -> None:
    space = {"seed": {"choice": [0]}}
    with pytest.raises(UserError, match="metric 'recall@5' is not available; choose one of recall@1, rec"):
        search(raw, space, metric="recall@5")
    raw["data"]["validation_fraction"] = 0
    with pytest.raises(UserError, match=r"set data\.validation_fraction above 0"):
        search(raw, space)


def test_a_list_is_set_before_its_parts(raw: dict[str, Any]) -> None:
    """In any order of the space. Otherwise the sample of the part would have no effect."""
    cohorts = [raw["cohort"]["peers"], [{}, {"update_mode": "skip"}]]
    space = {
        "cohort.peers.1.update_interval": {"choice": [1, 2]},
        "cohort.peers": {"choice": cohorts},
    }
    found = search(raw, space)
    params = {"cohort.peers.1.update_interval": "2", "cohort.peers": json.dumps(cohorts[1])}
    peer = found.config_of(params).cohort.peers[1]
    assert (peer.update_interval, peer.update_mode) == (2, "skip")
    assert found.config_of(found.baseline) == found.base  # and no choice was changed


def test_a_search_keeps_its_sampler(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna if it is installed, unless the search says otherwise."""
    space = {ANGLE: {"uniform": [0, 4]}}
    find_spec = importlib.util.find_spec
    assert search(raw, space, sampler="random").config.sampler_name == "random"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    assert search(raw, space).config.sampler_name == "random"
    with pytest.raises(UserError, match=r"pip install 'ray-dmml\[tune\]'"):
        search(raw, space, sampler="optuna")
