"""Mistakes in a config: each is reported with its place and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ray_dmml.config import habits
from ray_dmml.config.messages import all_names
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError

FROZEN = {"frozen": True}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"cohort": {"base": {"backbone": "vit_tiny_patch16_224", "weights": "offline"}}},
        r"cohort\.base: weights: offline are those of tf_.*_lite2; vit_tiny_patch16_224 needs pretrained or a file",
    ),
    ({"cohort": {"base": {"freeze_blocks": -1}}}, r"base\.freeze_blocks: Input should be greater .* 0 \(got -1\)$"),
    ({"cohort": {"base": {"freeze_blocks": "most"}}}, r"base\.freeze_blocks: Input should be 'all' \(got 'most'\)$"),
    ({"trian": {}}, r"trian: unknown setting; did you mean 'train'"),
    (
        {"cohort": {"peers": [{"update_intervall": 2}]}},
        r"cohort\.peers\.0\.update_intervall: unknown setting; did you mean 'update_interval'",
    ),
    ({"train": {"lr": 1}}, r"train\.lr: unknown setting; did you mean 'cohort\.base\.optimizer\.lr'"),
    ({"data": {"qqqq": 1}}, r"data\.qqqq: unknown setting; known here: name, root"),
    ({"cohort": {"bsae": {}}}, r"cohort\.bsae: unknown setting; did you mean 'base'"),
    ({"train": {"steps": "many"}}, r"train\.steps: .*integer.*'many'"),
    ({"train": {"steps": 2.5}}, r"train\.steps: .*2\.5"),
    ({"train": {"steps": True}}, r"train\.steps: a number is needed, not true or false"),
    ({"train": None}, r"train: .*None"),
    ({"cohort": {"peers": [{"update_interval": 0}]}}, r"update_interval: .*1 \(got 0\)"),
    ({"cohort": {"peers": [{"optimizer": {"lr": float("nan")}}]}}, r"optimizer\.lr: .*finite"),
    ({"cohort": {"peers": [{"view": "wild"}]}}, r"view: .*'weak', 'standard' or 'strong'.*'wild'"),
    ({"cohort": {"peers": [{"schedule": {"name": "cosine"}}]}}, "'cosine' needs steps"),
    ({"cohort": {"peers": [{"schedule": {"name": "step"}}]}}, "'step' needs milestones"),
    ({"cohort": {"peers": []}}, "at least one peer"),
    ({"cohort": {"peers": [{"name": "a"}, {"name": "a"}]}}, "unique; used twice: a"),
    ({"cohort": {"peers": [{"name": "../a"}]}}, r"peers\.0\.name: .*'\.\./a'"),
    ({"cohort": {"peers": [{}, {"seed": 0}]}}, "peer0 and peer1 have the same seed and settings"),
    ({"cohort": {"peers": [{}, FROZEN]}}, "a frozen peer never learns, so it needs weights: pretrained, offline or a"),
    ({"cohort": {"peers": [{"teacher_view": "evaluation"}]}}, "teacher_view: evaluation needs frozen: true"),
    ({"cohort": {"peers": [FROZEN | {"weights": "w"}]}}, "every peer is frozen"),
    (
        {"cohort": {"peers": [{}, FROZEN | {"weights": "w", "ema": {}}]}},
        "nothing to average",
    ),
    ({"cohort": {"base": 3}}, r"cohort\.base must be a mapping"),
    ({"data": {"name": "imagefolder"}}, r"'imagefolder' needs data\.root"),
    ({"data": {"name": "manifest", "root": "x"}}, r"needs data\.manifest"),
    ({"data": {"name": "cub"}}, r"data\.name: .*'cub200'.*\(got 'cub'\)"),
    ({"data": {"images_per_class": 1}}, r"images_per_class: .*2 \(got 1\)"),
    ({"evaluation": {"recall_at": []}}, r"evaluation\.recall_at: .*at least 1"),
]


HABITS: list[tuple[str, str]] = [
    ("epochs: 3", "epochs: unknown setting; the length is 'train.steps', in batches"),
    ("train: {epochs: 3}", "train.epochs: unknown setting; the length is 'train.steps', in batches"),
    ("batch_size: 3", "a batch is 'data.classes_per_batch' classes x 'data.images_per_class' images"),
    ("data: {batch_size: 3}", "a batch is 'data.classes_per_batch' classes x 'data.images_per_class' images"),
    ("device: cuda", "a peer uses a GPU if there is one; 'cohort.base.num_gpus' says how many"),
    ("path: x", "did you mean 'data.root'?"),
    ("data: {path: x}", "data.path: unknown setting; did you mean 'root'?"),
    ("image_size: 96", "did you mean 'cohort.base.input_size'?"),
    ("data: {image_size: 96}", "did you mean 'cohort.base.input_size'?"),
    ("cohort: {base: {image_size: 96}}", "cohort.base.image_size: unknown setting; did you mean 'input_size'?"),
    ("lr: 0.1", "did you mean 'cohort.base.optimizer.lr'?"),
    ("cohort: {peers: [{lr: 0.1}]}", "cohort.peers.0.lr: unknown setting; did you mean 'optimizer.lr'?"),
    ("cohort: {base: {optimizer: {learning_rate: 1}}}", "learning_rate: unknown setting; did you mean 'lr'?"),
    ("model: resnet50", "did you mean 'cohort.base.backbone'?"),
    ("cohort: {num_peers: 3}", "'cohort.peers' is a list with an entry for each peer"),
    ("cohort: {peers: 3}", "cohort.peers: a list with an entry for each peer is needed, such as [{}, {}, {}]"),
    ("cohort: {peers: {a: {}}}", "a list with an entry for each peer is needed, such as [{name: a}]"),
    ("cohort: {peers: [resnet50]}", "(got 'resnet50'); did you mean cohort.peers.0.backbone=resnet50?"),
    ("cohort: {base: {schedule: cosine}}", "did you mean cohort.base.schedule.name=cosine?"),
    ("cohort: {base: {ema: true}}", "it has settings of its own (decay, as_teacher), not a value (got True)"),
    ("loss: {metric: MultiSimilarityLoss}", "did you mean loss.metric.name=MultiSimilarityLoss?"),
    ("loss: MultiSimilarityLoss", "did you mean loss.metric.name=MultiSimilarityLoss?"),
    ("loss: {margin: 0.1}", "arguments of the metric loss are in 'loss.metric.args'"),
    ("loss: {metric: {margin: 0.1}}", "arguments of the class are in 'args': did you mean 'args.margin'?"),
    ("evaluation: {recall_at: 5}", "evaluation.recall_at: a list is needed (got 5), such as [5]"),
    ("weights: pretrained", "did you mean 'cohort.base.weights'?"),
    ("cohort: {base: {pretrained: true}}", "write `weights: pretrained` for each peer, or once in 'cohort.base'"),
    ("cohort: {base: {schedule: {num_steps: 3}}}", "schedule.num_steps: unknown setting; did you mean 'steps'?"),
    ("loss: {relational: {warmup: 3}}", "did you mean 'warmup_steps'?"),
    ("data: {data: photos}", "the folder of your images is 'data.root'; with a folder for each class, 'data.name' is"),
    ("code: null", "code: a list is needed, not null"),
    ("train: {out: runs/x}", "the folder of a run is not a setting: it is `train --out`, or `out` of train()"),
]


@pytest.mark.parametrize(("text", "message"), HABITS)
def test_names_of_other_tools_are_understood(text: str, message: str, tmp_path: Path) -> None:
    """The message has the setting to write, relative to the section only where it is in that section."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        Config.load(tmp_path / "c.yaml")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_habits_lead_to_settings_that_exist() -> None:
    """And no name stands in the table that is a setting there."""
    names = set(all_names(Config))
    for name in [*habits.OF_A_RUN, *habits.OF_A_PEER]:
        assert habits.setting_of(name) in names, name
    quoted = re.findall(r"'([a-z_.]+)'", " ".join(habits.SENTENCES.values()))
    places = {place.replace("cohort.base", "cohort.peers").removesuffix(".args.margin") for place in quoted}
    assert len(places) > 5 and places <= names


@pytest.mark.parametrize(("raw", "message"), MISTAKES)
def test_mistakes_are_reported(raw: dict[str, Any], message: str) -> None:
    """The message names the setting and what is allowed, on one line."""
    with pytest.raises(UserError, match=message) as caught:
        Config.parse(raw)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_reported_at_once() -> None:
    """Three mistakes in three sections are three lines of one message."""
    raw = {"sede": 1, "train": {"steps": 0}, "data": {"classes_per_batch": 1}}
    with pytest.raises(UserError) as caught:
        Config.parse(raw, source="my.yaml")
    text = str(caught.value)
    assert text.startswith("my.yaml: ")
    for mistake in ("sede: unknown", "train.steps: ", "data.classes_per_batch: "):
        assert mistake in text
    assert len(text.strip().splitlines()) == 4


def test_a_mistake_in_the_base_is_reported_once(tmp_path: Path) -> None:
    """It is reported at the base, with the names of a peer's settings. A peer's own is reported at the peer."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "cohort:\n"
        "  base: {bakbone: a, optimizer: {lr: -1, beta: 3}}\n"
        "  peers: [{}, {optimizer: {lr: -2}}, null, {typ: 1}]\n"
    )
    with pytest.raises(UserError) as refused:
        Config.load(file)
    lines = [line.strip().split(":")[:2] for line in str(refused.value).splitlines()[1:]]
    assert sorted(place for place, _ in lines) == [
        "cohort.base.bakbone",
        "cohort.base.optimizer.beta",
        "cohort.base.optimizer.lr",
        "cohort.peers.1.optimizer.lr",
        "cohort.peers.3.typ",
    ]
    assert "did you mean 'backbone'?" in str(refused.value)
    with pytest.raises(UserError, match=r"^config: cohort\.base\.bakbone: unknown .* 'backbone'\?$"):
        Config.parse({"cohort": {"base": {"bakbone": "a"}}})


@pytest.mark.parametrize(
    ("base", "peers", "places"),
    [
        # inside of a list
        ({"view": [{"nam": "CenterCrop"}]}, [{}, {}], ["base.view.0.name", "base.view.0.nam"]),
        # a mistake in a combination of settings
        ({"frozen": True}, [{}, None, {"name": "a"}], ["base", "peers.2"]),
        ({"embedding_size": 8}, [0, "", {}], ["peers.0", "peers.1"]),
        # the default of init_seed is the seed
        ({"seed": "x"}, [{}, {}], ["base.seed"]),
        (None, [{}, {"seed": "x"}], ["peers.1.seed"]),
        ({1: 2}, None, ["base.1"]),
        ({"embedding_size": 0}, None, ["base.embedding_size"]),
        ({}, [{"embedding_size": 0}], ["peers.0.embedding_size"]),
    ],
)
def test_a_mistake_is_reported_where_it_is_written(base: Any, peers: list[Any] | None, places: list[str]) -> None:
    """It is reported once, even if several peers inherit it from the base."""
    raw = {"base": base, "peers": peers}
    with pytest.raises(UserError) as refused:
        Config.parse({"cohort": {key: part for key, part in raw.items() if part is not None}})
    text = str(refused.value).removeprefix("config: ")
    reported = [line.strip().split(": ")[0] for line in text.strip().splitlines()]
    assert reported == [f"cohort.{place}" for place in places], text


@pytest.mark.parametrize("more", [0, 1, 5])
def test_mistakes_past_the_twentieth_are_counted_once(more: int) -> None:
    """They are not counted again for each peer that inherits them from the base."""
    base = {f"wrong{number}": 1 for number in range(20 + more)}
    with pytest.raises(UserError) as refused:
        Config.parse({"cohort": {"base": base, "peers": [{}, {}, {}]}})
    lines = str(refused.value).splitlines()[1:]
    assert len({line for line in lines if "unknown setting" in line}) == 20
    assert lines[20:] == ([f"  ... and {more} more"] if more else [])


def test_the_tags_of_a_view_are_not_settings() -> None:
    """Pydantic adds `list` and `preset` to the location of a mistake. A setting may have these names too."""
    for name in ("list", "preset"):
        with pytest.raises(UserError, match=f"{name}: unknown setting"):
            Config.parse({name: None})
    with pytest.raises(UserError, match=r"cohort\.peers\.0\.view\.0\.name"):
        Config.parse({"cohort": {"peers": [{"view": [{}]}]}})
