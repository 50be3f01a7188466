"""What may be searched, checked before anything runs; and what is made of the trials."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from ray.tune.schedulers.pbt import _explore
from rich.console import Console

from ray_dmml.config.loading import QUICKSTART, read_settings
from ray_dmml.errors import UserError
from ray_dmml.loggers.console import final_table
from ray_dmml.tune.report import at_common_step, importance, write_page
from ray_dmml.tune.search_space import Search, SearchConfig, final_head, final_rows, load_search
from ray_dmml.tune.tuner import Trial, _inside_the_space, _mutations, best_trial, pareto, tie


def search(raw: dict[str, Any], space: dict[str, Any], **settings: Any) -> Search:
    return Search(raw, SearchConfig.model_validate({"space": space, **settings}))


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder)


def trial(number: int, objective: float | None, cost: float = 1.0, **changes: Any) -> Trial:
    reports = [] if objective is None else [{"step": 5, "objective": objective, "cost": cost}]
    known = {"params": {}, "finished": True, "number": number, **changes}
    return Trial(str(number), reports=reports, **known)


def test_the_built_in_search_is_of_the_quickstart() -> None:
    """Its trial 0 is the quickstart as it is; it varies weights, seeds, updates and views."""
    built_in = Search(read_settings(QUICKSTART), load_search())
    assert built_in.config_of(built_in.default) == built_in.base
    assert {key.rsplit(".", 1)[-1] for key in built_in.config.space} >= {
        "distance_weight",
        "angle_weight",
        "init_seed",
        "update_interval",
        "view",
    }
    config = built_in.trial_config(built_in.default)
    assert config.train.steps == config.checkpoint.every_steps * 4 == 100
    assert config.evaluation.split == "validation"
    assert config.cohort.peers[0].schedule.steps == 100


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"loss.relational.distnce": {"uniform": [0, 2]}}, r"relational\.distnce: .*did you mean 'distance_weight'"),
        ({"loss.relational.angle_weight": {"uniform": [-1, 4]}}, r"relational\.angle_weight: -1.0: .*greater than or equal to 0"),
        ({"cohort.peers.1.backbone": {"choice": ["test_resnet", 7]}}, r"space\.cohort\.peers\.1\.backbone: 7"),
        ({"data.validation_fraction": {"choice": [0.4, 0]}}, r"data\.validation_fraction must stay .* same classes"),
        ({"data.split_seed": {"choice": [None, 3]}}, r"data\.split_seed: 3: .* final runs are tested on"),
        ({"evaluation.recall_at": {"choice": [[1, 2], [1]]}}, r"evaluation\.recall_at must stay .* judged alike"),
        ({"train.evaluate_every": {"choice": [2, 1]}}, r"train\.evaluate_every must stay .* same steps"),
        ({"data.validation_fold": {"integer": [0, 1]}}, r"data\.validation_fold must stay .* sets it itself"),
        # A part of a number is drawn between the ends.
        ({"cohort.peers.1.update_interval": {"uniform": [1, 4]}}, r"update_interval: 1\.95.*: .*valid integer"),
        ({"loss.relational.warmup_steps": {"uniform": [0, 100]}}, r"warmup_steps: 31\.8.*: .*valid integer"),
        ({"cohort.peers.5.seed": {"integer": [0, 3]}}, r"cohort\.peers has entries 0 to 1"),
        ({"loss.relational.distance_weight": {"uniform": [2, 4]}}, r"own value 1.0 is not from 2 to 4"),
        ({"cohort.peers.1.view": {"choice": ["standard", "strong"]}}, "own value is none of standard, strong"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused(
    raw: dict[str, Any], space: dict[str, Any], says: str
) -> None:
    """Unknown settings, values that a config refuses, and a space without the config itself."""
    with pytest.raises(UserError, match=says):
        search(raw, space)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("space: {seed: {choice: [0], uniform: [0, 1]}}", "give one of choice, uniform, .* not 2"),
        ("space: {seed: {uniform: [2, 1]}}", "the lower one first"),
        ("space: {seed: {loguniform: [0, 1]}}", "above 0"),
        ("space: {}", "at least 1 item"),
        ("space: {seed: {logunifrom: [1, 2]}}", "did you mean 'loguniform'"),
        ("objectiv: ensemble\nspace: {seed: {choice: [0]}}", "objectiv: unknown setting; did you mean 'objective'"),
        ("seed: -1\nspace: {seed: {choice: [0]}}", "seed: .*greater than or equal to 0"),
        ("folds: 2\nspace: {seed: {choice: [0]}}", "folds 2 needs scheduler: none"),
        ("- space", "must hold settings"),
        ("space: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_search_file_that_cannot_be_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """With the place and what is allowed."""
    (tmp_path / "search.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        load_search(tmp_path / "search.yaml")
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_search(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trial": {"loss.relational.angle_weight": 3}}, r"trial\.loss\.relational\.angle_weight replaces what is drawn"),
        ({"trial": {"loss": {}}}, r"trial\.loss replaces what is drawn for space\.loss\.relational\.angle_weight"),
        ({"trial": {"data.validation_fraction": 0}}, "data.validation_fraction above 0"),
        ({"trial": {"data.validation_fraction": 0.5}, "folds": 3, "scheduler": "none"}, "0.5 gives at most 2"),
        ({"trial": {"data.train_fraction": 0.9}}, r"trial: data\.train_fraction must stay .* are tested on"),
        ({"trial": {"evaluation.recall_at": [1]}}, r"trial: evaluation\.recall_at must stay"),
        ({"trial": {"checkpoint.storage_path": "there"}}, r"trial: checkpoint\.storage_path must stay"),
        ({"space": {"cohort.peers": {"choice": [[{}, {"view": "weak"}], [{}, {}, {}]]},
                    "loss.relational.angle_weight": {"uniform": [0, 4]}}, "scheduler": "pbt"}, "all need as many"),
    ],
)  # fmt: skip
def test_trials_whose_settings_undo_the_search_are_refused(
    raw: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    """Draws that would change nothing, no classes to judge on, and folds that would overlap."""
    space = {"loss.relational.angle_weight": {"uniform": [0, 4]}}
    assert search(raw, space, trial={"train.steps": 2}).default == {
        "loss.relational.angle_weight": 2.0
    }
    with pytest.raises(UserError, match=says):
        search(raw, **{"space": space, **settings})


def test_a_population_may_have_another_number_of_peers_than_the_config(raw: dict[str, Any]) -> None:
    space = {"loss.relational.angle_weight": {"uniform": [0, 4]}}
    found = search(raw, space, trial={"cohort.peers": [{}, {}, {}]}, scheduler="pbt")
    assert len(found.trial_config({}).cohort.peers) == 3


def test_trials_hold_out_the_classes_that_the_config_does(raw: dict[str, Any]) -> None:
    """Folds begin at the first."""
    space = {"loss.relational.angle_weight": {"uniform": [0, 4]}}
    raw["data"]["validation_fold"] = 2
    assert search(raw, space).trial_config({}).data.validation_fold == 2
    with pytest.raises(UserError, match=r"leave out data\.validation_fold"):
        search(raw, space, folds=2, scheduler="none")
    del raw["data"]["validation_fold"]
    asked = search(raw, space, folds=2, scheduler="none")
    assert [asked.trial_config({}, n).data.validation_fold for n in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("reports", "own", "expected"), [(6, 0, 6), (6, 2, 2), (6, 4, 6), (6, 12, 6), (0, 3, 3)]
)
def test_trials_keep_their_state_at_each_report_and_where_the_config_does(
    raw: dict[str, Any], reports: int, own: int, expected: int
) -> None:
    """A trial that reports at its end alone is not lost with its process."""
    raw["train"] |= {"steps": 12, "evaluate_every": reports}
    raw["checkpoint"]["every_steps"] = own
    asked = search(raw, {"loss.relational.angle_weight": {"uniform": [0, 4]}})
    assert asked.trial_config({}).checkpoint.every_steps == expected


def test_the_first_trial_is_the_config_where_a_peer_states_its_own(raw: dict[str, Any]) -> None:
    """A base's value is that of the peers who do not; settings that replace each other are refused."""
    raw["cohort"]["base"]["optimizer"] = {"lr": 1e-3}
    raw["cohort"]["peers"] = [{"optimizer": {"lr": 1e-4}}, {}]
    lr = {"loguniform": [1e-5, 1e-2]}
    found = search(raw, {"cohort.base.optimizer.lr": lr})
    assert found.default == {"cohort.base.optimizer.lr": 1e-3}
    assert found.config_of(found.default) == found.base
    # Each by itself is allowed; together the peers' leave the base's nothing to set.
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
    assert found.config_of(found.default) == found.base
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
    assert found.objective(figures) == 0.5


def test_a_search_needs_validation_classes_and_a_metric_that_is_taken(raw: dict[str, Any]) -> None:
    space = {"seed": {"choice": [0]}}
    with pytest.raises(UserError, match="metric 'recall@5' is not taken; there are recall@1, rec"):
        search(raw, space, metric="recall@5")
    raw["data"]["validation_fraction"] = 0
    with pytest.raises(UserError, match=r"set data\.validation_fraction above 0"):
        search(raw, space)


def test_the_best_is_the_best_of_those_that_finished() -> None:
    """A trial that was ended early or failed is not chosen, of equals the first is."""
    trials = [
        trial(0, 0.5),
        trial(1, 0.9, finished=False),
        trial(2, 0.7),
        trial(3, 0.7),
        trial(4, None, finished=False, error="it broke"),
    ]
    assert best_trial(trials).number == 2
    with pytest.raises(UserError, match="no trial of 1 finished: it broke"):
        best_trial(trials[4:])


def test_a_best_that_is_one_of_several_is_told() -> None:
    """And which they are; a trial that did not finish is none of them."""
    trials = [trial(0, 1.0), trial(1, 0.5), trial(2, 1.0), trial(3, 1.0, finished=False)]
    assert "trials 0, 2 are equally good" in (tie(trials, best_trial(trials)) or "")
    assert tie(trials[:2], trials[0]) is None


def test_the_page_says_nothing_of_settings_that_few_trials_tried(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """Neither where all trials are equal. Pictures say what they show."""
    found = search(raw, {"loss.relational.angle_weight": {"uniform": [0, 4]}})
    for values, plots in [([0.1, 0.2, 0.3], 3), ([0.5] * 9, 3), (list(np.linspace(0, 1, 9)), 4)]:
        trials = [
            trial(n, float(value), params={"loss.relational.angle_weight": n / 3})
            for n, value in enumerate(values)
        ]
        write_page(tmp_path / "page.html", found, trials, best_trial(trials), None)
        page = (tmp_path / "page.html").read_text()
        assert page.count("<img") == plots and 'alt=""' not in page
        assert ("Left out: " in page) == (plots == 3)


def test_pareto_is_who_nobody_beats() -> None:
    """Against the definition, pair by pair."""
    rng = np.random.default_rng(0)
    trials = [
        trial(n, float(value), float(cost))
        for n, (value, cost) in enumerate(rng.integers(0, 6, (40, 2)))
    ]
    expected = {
        one.number
        for one in trials
        if not any(
            other.reports[0]["objective"] >= one.reports[0]["objective"]
            and other.reports[0]["cost"] <= one.reports[0]["cost"]
            and other.reports[0] != one.reports[0]
            for other in trials
        )
    }
    assert {each.number for each in pareto(trials)} == expected


def test_importance_is_the_share_of_variance(raw: dict[str, Any]) -> None:
    """All of it with a setting that decides, next to none with one that does nothing."""
    found = search(
        raw,
        {
            "loss.relational.distance_weight": {"uniform": [0, 10]},
            "cohort.peers.1.update_interval": {"choice": [1, 2, 3]},
        },
    )
    rng = np.random.default_rng(0)
    trials = []
    for n in range(300):
        params = {
            "loss.relational.distance_weight": float(rng.uniform(0, 10)),
            "cohort.peers.1.update_interval": str(rng.integers(1, 4)),
        }
        objective = 0.1 * int(params["cohort.peers.1.update_interval"])
        trials.append(trial(n, objective, params=params))
    shares = importance(trials, found)
    assert shares["cohort.peers.1.update_interval"] == pytest.approx(1)
    assert shares["loss.relational.distance_weight"] < 0.05


def test_trials_are_compared_at_a_step_that_all_reached(raw: dict[str, Any]) -> None:
    """One that was ended early is not worse for that."""

    def reported(number: int, values: list[float]) -> Trial:
        rows = [{"step": 10 * n, "objective": v, "cost": 1.0} for n, v in enumerate(values, 1)]
        return Trial(str(number), {}, rows, number=number)

    trials = [reported(0, [0.2, 0.5, 0.9]), reported(1, [0.3, 0.4])]
    # Population based training has given it another draw since.
    trials[0].params = {"loss.relational.angle_weight": 3.0}
    trials[0].reports[1]["params"] = {"loss.relational.angle_weight": 2.0}
    alike = at_common_step(trials)
    assert [t.objective for t in alike] == [0.5, 0.4]
    assert alike[0].params == {"loss.relational.angle_weight": 2.0}
    assert trials[0].objective == 0.9 and trials[0].params == {"loss.relational.angle_weight": 3.0}


def test_the_page_says_of_which_step_it_is(raw: dict[str, Any], tmp_path: Path) -> None:
    """Trials of other lengths may have none in common."""
    found = search(raw, {"loss.relational.angle_weight": {"uniform": [0, 4]}})
    one, other = (
        trial(n, n / 10, params={"loss.relational.angle_weight": 1.0 + n}) for n in (1, 2)
    )
    for step, says in ((5, "step 5, which all trials reached"), (3, "the last report of each")):
        other.reports[-1]["step"] = step
        write_page(tmp_path / "page.html", found, [one, other], other, None)
        assert says in (tmp_path / "page.html").read_text()


def test_the_final_table_has_means_and_deviations(raw: dict[str, Any]) -> None:
    """Over the seeds; and one line where the config as it is, is the best."""
    found = search(raw, {"loss.relational.angle_weight": {"uniform": [0, 4]}}, metric="recall@1")

    def run(ensemble: float, *peers: float) -> dict[str, Any]:
        each = [{"recall@1": value, "map@r": value / 2} for value in (ensemble, *peers)]
        return {"ensemble": each[0], "peers": dict(enumerate(each[1:]))}

    best = {
        "params": {"a": 1},
        "validation": 0.75,
        "test": [run(0.8, 0.6, 0.8), run(0.9, 0.7, 0.7)],
    }
    default = {"params": {"a": 0}, "validation": None, "test": [run(0.5, 0.4, 0.4)]}
    rows = final_rows({"best": best, "default": default}, found)
    assert rows[0] == [
        "best setting",
        "75.0",
        "85.0 ± 7.1",
        "42.5 ± 3.5",
        "70.0 ± 0.0",
        "35.0 ± 0.0",
    ]
    assert rows[1] == ["config as it is", "-", "50.0", "25.0", "40.0", "20.0"]
    assert len(final_head(found)) == len(rows[0])
    (only,) = final_rows({"best": best, "default": best}, found)
    assert only == ["config as it is", *rows[0][1:]]
    said = "no trial beat the config as it is"
    for final, expected in (
        ({"best": best, "default": default}, 0),
        ({"best": best, "default": best}, 1),
    ):
        told = io.StringIO()
        final_table(final, found, Console(file=told, width=100))
        assert told.getvalue().count(said) == expected


def test_perturbed_settings_stay_in_the_space(raw: dict[str, Any]) -> None:
    """Population based training multiplies; names are left alone."""
    space = {
        "loss.relational.angle_weight": {"loguniform": [0.1, 10]},
        "cohort.peers.1.update_interval": {"integer": [1, 4]},
        "loss.relational.warmup_steps": {"choice": [0, 5]},
    }
    found = search(raw, space, scheduler="pbt")
    drawn = {
        "loss.relational.angle_weight": 12.0,
        "cohort.peers.1.update_interval": 5,
        "loss.relational.warmup_steps": "5",
    }
    assert list(_inside_the_space(found, drawn).values()) == [10, 4, "5"]
    lower = _inside_the_space(found, {**drawn, "loss.relational.angle_weight": 0.01})
    assert lower["loss.relational.angle_weight"] == 0.1


def test_a_whole_is_drawn_before_its_parts(raw: dict[str, Any]) -> None:
    """In whatever order the space names them, or the part would be drawn for nothing."""
    cohorts = [raw["cohort"]["peers"], [{}, {"update_mode": "skip"}]]
    space = {
        "cohort.peers.1.update_interval": {"choice": [1, 2]},
        "cohort.peers": {"choice": cohorts},
    }
    found = search(raw, space)
    drawn = {"cohort.peers.1.update_interval": "2", "cohort.peers": json.dumps(cohorts[1])}
    peer = found.config_of(drawn).cohort.peers[1]
    assert (peer.update_interval, peer.update_mode) == (2, "skip")
    assert found.config_of(found.default) == found.base  # and no choice was changed by it


def test_population_based_training_changes_no_net_in_mid_run(raw: dict[str, Any]) -> None:
    """What a net was made with goes with its weights."""
    raw["cohort"]["peers"][1] = {"schedule": {"name": "step", "milestones": [2]}}
    of_nets = {
        "cohort.peers.1.init_seed": {"choice": [0, 1]},
        "cohort.peers": {"choice": [raw["cohort"]["peers"], [{}, {}]]},
        "cohort.base.optimizer.name": {"choice": ["adam", "sgd"]},
        "cohort.peers.1": {"choice": [raw["cohort"]["peers"][1], {}]},
    }
    others = {
        "cohort.base.optimizer.lr": {"loguniform": [1e-5, 1.0]},
        "loss.relational.angle_weight": {"uniform": [0, 4]},
        "cohort.peers.1.schedule.milestones.0": {"choice": [2, 3]},
    }
    found = search(raw, {**of_nets, **others}, scheduler="pbt")
    assert found.changed_in_mid_run == list(others)
    with pytest.raises(UserError, match="count only at the start"):
        search(raw, of_nets, scheduler="pbt")


@pytest.mark.parametrize(("high", "own", "reached"), [(4, 2, {1, 3}), (500, 200, {160, 240})])
def test_whole_numbers_are_changed(
    raw: dict[str, Any], high: int, own: int, reached: set[int]
) -> None:
    """By Ray: few of them to a neighbour, as 0.8 and 1.2 times 2 are 2, rounded; many by these factors."""
    key = "loss.relational.warmup_steps"
    raw["loss"] = {"relational": {"warmup_steps": 1}}
    found = search(raw, {key: {"integer": [1, high]}}, scheduler="pbt")
    mutations = {key: _mutations(found, key)}
    changed = {_explore({key: own}, mutations, 0, (1.2, 0.8), None)[0][key] for _ in range(50)}
    assert changed == reached
