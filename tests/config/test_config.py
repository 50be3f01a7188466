"""The config: in and out of YAML, overrides, and every mistake told in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from ray_dmml.config.document import documented_yaml
from ray_dmml.config.schema import (
    CohortConfig,
    Config,
    DataConfig,
    EmaConfig,
    EvaluationConfig,
    LossConfig,
    MetricLossConfig,
    MinerConfig,
    OptimizerConfig,
    PeerConfig,
    RelationalConfig,
    ScheduleConfig,
    TrainConfig,
    Transform,
)
from ray_dmml.errors import UserError

REPOSITORY = Path(__file__).parents[2]
ALL_SECTIONS: tuple[type[BaseModel], ...] = (
    Config,
    DataConfig,
    Transform,
    OptimizerConfig,
    ScheduleConfig,
    EmaConfig,
    PeerConfig,
    CohortConfig,
    MinerConfig,
    MetricLossConfig,
    RelationalConfig,
    LossConfig,
    TrainConfig,
    EvaluationConfig,
)

# --- random valid configs -------------------------------------------------------------------

TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8
)
FREE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SETTINGS = st.dictionaries(TEXT, FREE, max_size=3)
TRANSFORM = st.fixed_dictionaries({"name": TEXT}, optional={"args": SETTINGS})
RATE = st.floats(0, 1e3) | st.sampled_from([1e-5, 3e-7, 0])
OPTIMIZER = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["adam", "adamw", "sgd"]),
        "lr": RATE,
        "head_lr": st.none() | RATE,
        "clip_norm": st.none() | st.floats(1e-3, 1e3),
    },
)
SCHEDULE = st.sampled_from(
    [
        {"name": "constant", "warmup_steps": 3},
        {"name": "step", "milestones": [2, 5], "gamma": 0.1},
        {"name": "cosine", "steps": 9},
    ]
)
PEER = st.fixed_dictionaries(
    {},
    optional={
        "backbone": TEXT,
        # ~somebody is a mistake where nobody is called so: test_bad_input has it.
        "weights": TEXT.filter(lambda text: not text.startswith("~")),
        "embedding_size": st.integers(1, 999),
        "init_seed": st.integers(-5, 5),
        "view": st.sampled_from(["weak", "strong"]) | st.lists(TRANSFORM, max_size=3),
        "update_interval": st.integers(1, 9),
        "update_mode": st.sampled_from(["accumulate", "skip"]),
        "ema": st.none() | st.fixed_dictionaries({"decay": st.floats(0.01, 0.99)}),
        "optimizer": OPTIMIZER,
        "schedule": SCHEDULE,
        "amp": st.sampled_from(["off", "bfloat16"]),
        "num_gpus": st.none() | st.floats(0, 1) | st.integers(2, 8),
    },
)
METRIC = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["TripletMarginLoss", "ProxyAnchorLoss"]),
        "args": SETTINGS,
        "miner": st.none() | TRANSFORM,
        "reducer": st.none() | TEXT,
    },
)
CONFIG = st.fixed_dictionaries(
    {"cohort": st.fixed_dictionaries({"peers": st.lists(PEER, min_size=1, max_size=3)})},
    optional={
        "seed": st.integers(-(2**40), 2**40),
        "data": st.fixed_dictionaries(
            {"name": st.just("imagefolder"), "root": st.just("/some where/# images")}
        ),
        "loss": st.fixed_dictionaries({"metric": METRIC}),
        "evaluation": st.fixed_dictionaries(
            {"recall_at": st.lists(st.integers(1, 9), min_size=1, max_size=3)}
        ),
    },
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIG)
def test_every_config_survives_yaml(tmp_path_factory: Any, raw: dict[str, Any]) -> None:
    """What `to_yaml` and the documented form write, `load` reads as the same config."""
    config = Config.parse(raw)
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    for text in (config.to_yaml(), documented_yaml(config)):
        file.write_text(text, encoding="utf-8")
        # Weights that are files become absolute: relative ones mean the config's own folder.
        expected = [
            peer.weights
            if peer.weights in ("", "none", "pretrained", "offline")
            else str(file.parent / Path(peer.weights).expanduser())
            for peer in config.cohort.peers
        ]
        found = Config.load(file)
        assert [peer.weights for peer in found.cohort.peers] == expected
        peers = tuple(
            peer.model_copy(update={"weights": old.weights})
            for peer, old in zip(found.cohort.peers, config.cohort.peers, strict=True)
        )
        cohort = found.cohort.model_copy(update={"peers": peers})
        assert found.model_copy(update={"cohort": cohort}) == config


def test_every_setting_is_documented(image_folder: Path) -> None:
    """Each field of each section has a docstring, and `ray-dmml config` prints all of them."""
    raw = tiny(image_folder)
    raw["cohort"]["base"]["ema"] = {}
    raw["cohort"]["peers"][0] = {"view": [{"name": "RandomResizedCrop"}]}
    printed = " ".join(documented_yaml(Config.parse(raw)).replace("#", " ").split())
    printed = printed.replace("- ", "-")  # a wrapped word
    for section in ALL_SECTIONS:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            told = " ".join(field.description.split()).replace("#", " ").replace("- ", "-")
            assert told in printed, f"{section.__name__}.{name}"


def test_no_comment_is_wider_than_a_terminal_would_show(image_folder: Path) -> None:
    """The documentation is wrapped, and peers after the first do not repeat it."""
    text = documented_yaml(Config.parse(tiny(image_folder)))
    assert max(len(line) for line in text.splitlines() if "# " in line) <= 90
    assert text.count("any timm model name".capitalize()) == 1


@pytest.mark.parametrize(
    "file", [None, *sorted((REPOSITORY / "experiments" / "configs").glob("*.yaml"))], ids=str
)
def test_shipped_configs_are_valid(file: Path | None, tmp_path: Path) -> None:
    """The quickstart and every config of experiments/ load."""
    overrides = [] if file is None else [f"data.root={tmp_path}"]
    config = Config.load(file, overrides)
    assert len(config.cohort.peers) >= 1 and config.train.steps >= 1


# --- base, differences, overrides -----------------------------------------------------------


def test_peers_are_a_base_and_differences() -> None:
    """An entry states what differs; deep settings merge; names and seeds follow the position."""
    config = Config.parse(
        {
            "cohort": {
                "base": {"embedding_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}},
                "peers": [
                    None,
                    {"optimizer": {"lr": 0.2}, "seed": 7},
                    {"name": "c", "init_seed": 0},
                ],
            }
        }
    )
    one, two, three = config.cohort.peers
    assert (one.name, one.seed, one.init_seed, one.embedding_size) == ("peer0", 0, 0, 32)
    assert (two.name, two.seed, two.init_seed) == ("peer1", 7, 7)
    assert (two.optimizer.name, two.optimizer.lr, one.optimizer.lr) == ("sgd", 0.2, 0.1)
    assert (three.name, three.seed, three.init_seed, three.optimizer.lr) == ("c", 2, 0, 0.1)


def test_a_list_in_an_entry_replaces_that_of_the_base() -> None:
    """A view is a whole: that of the base does not shine through."""
    base = {"view": [{"name": "RandomGrayscale"}, {"name": "RandomResizedCrop"}]}
    peers = [{}, {"view": [{"name": "CenterCrop"}]}, {"view": "weak"}]
    first, second, third = Config.parse({"cohort": {"base": base, "peers": peers}}).cohort.peers
    assert [transform.name for transform in first.view] == ["RandomGrayscale", "RandomResizedCrop"]
    assert [transform.name for transform in second.view] == ["CenterCrop"]
    assert third.view == "weak"


def test_a_mistake_of_the_base_is_told_once(tmp_path: Path) -> None:
    """Where it stands, with what a peer may have; a peer's own under its number, also of the same setting."""
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
    with pytest.raises(
        UserError, match=r"^config: cohort\.base\.bakbone: unknown .* 'backbone'\?$"
    ):
        Config.parse({"cohort": {"base": {"bakbone": "a"}}})


@pytest.mark.parametrize(
    ("base", "peers", "places"),
    [
        # inside of a list, and of what the transform is given
        ({"view": [{"nam": "CenterCrop"}]}, [{}, {}], ["base.view.0.name", "base.view.0.nam"]),
        # between settings of a peer; a peer that says more itself is told of by its number
        ({"frozen": True}, [{}, None, {"name": "a"}], ["base", "peers.2"]),
        ({"embedding_size": 8}, [0, "", {}], ["peers.0", "peers.1"]),
        # init_seed is the seed where nobody says otherwise
        ({"seed": "x"}, [{}, {}], ["base.seed"]),
        (None, [{}, {"seed": "x"}], ["peers.1.seed"]),
        ({1: 2}, None, ["base.1"]),
        ({"embedding_size": 0}, None, ["base.embedding_size"]),
        ({}, [{"embedding_size": 0}], ["peers.0.embedding_size"]),
    ],
)
def test_a_mistake_is_told_where_it_stands(
    base: Any, peers: list[Any] | None, places: list[str]
) -> None:
    """Once, however many peers have it from the base."""
    raw = {"base": base, "peers": peers}
    with pytest.raises(UserError) as refused:
        Config.parse({"cohort": {key: part for key, part in raw.items() if part is not None}})
    text = str(refused.value).removeprefix("config: ")
    told = [line.strip().split(": ")[0] for line in text.strip().splitlines()]
    assert told == [f"cohort.{place}" for place in places], text


@pytest.mark.parametrize("more", [0, 1, 5])
def test_mistakes_past_the_twentieth_are_counted_once(more: int) -> None:
    """Not once for each peer that has them from the base."""
    base = {f"wrong{number}": 1 for number in range(20 + more)}
    with pytest.raises(UserError) as refused:
        Config.parse({"cohort": {"base": base, "peers": [{}, {}, {}]}})
    lines = str(refused.value).splitlines()[1:]
    assert len({line for line in lines if "unknown setting" in line}) == 20
    assert lines[20:] == ([f"  ... and {more} more"] if more else [])


def test_overrides_reach_everything(tmp_path: Path) -> None:
    """Nested keys, list entries, whole sections, and peers that the file does not list."""
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\ntrain: {steps: 5}\n")
    config = Config.load(
        file,
        [
            "train.log_every=2",
            "cohort.peers.1.update_interval=4",
            "cohort.peers.1.optimizer={name: sgd, lr: 1e-2}",
            "cohort.base.embedding_size=16",
            "evaluation.recall_at=[1, 3]",
            "loss.relational.angle_weight=0.5",
            "seed=4",
            "seed=5",
        ],
    )
    assert (config.seed, config.train.steps, config.train.log_every) == (5, 5, 2)
    assert [peer.update_interval for peer in config.cohort.peers] == [1, 4]
    assert [peer.embedding_size for peer in config.cohort.peers] == [16, 16]
    assert config.cohort.peers[1].optimizer == OptimizerConfig(name="sgd", lr=0.01)
    assert config.evaluation.recall_at == (1, 3) and config.loss.relational.angle_weight == 0.5
    file.write_text("cohort:\n  peers:\n    -\n    - {view: [{name: CenterCrop}]}\n")
    config = Config.load(file, ["cohort.peers.1.view.0.args.size=8", "cohort.peers.0.seed=9"])
    assert config.cohort.peers[1].view[0].args == {"size": 8}
    assert config.cohort.peers[0].seed == 9


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in a file are relative to the file, those of an override to the current folder."""
    (tmp_path / "inside").mkdir()
    file = tmp_path / "inside" / "c.yaml"
    file.write_text(
        "data: {name: manifest, root: images, manifest: ../m.csv}\n"
        "cohort: {base: {weights: w.pth}, peers: [{}, {weights: none}, {weights: /abs/w.pth}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = Config.load(file)
    assert config.data.root == tmp_path / "inside" / "images"
    assert config.data.manifest is not None
    assert config.data.manifest.resolve() == tmp_path / "m.csv"
    weights = [peer.weights for peer in config.cohort.peers]
    assert weights == [str(tmp_path / "inside" / "w.pth"), "none", "/abs/w.pth"]
    config = Config.load(file, ["data.root=here", "cohort.peers.1.weights=there.pth"])
    assert config.data.root == tmp_path / "here"
    assert config.cohort.peers[1].weights == str(tmp_path / "there.pth")


# --- mistakes -------------------------------------------------------------------------------

FROZEN = {"frozen": True}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"trian": {}}, r"trian: unknown setting; did you mean 'train'"),
    (
        {"cohort": {"peers": [{"update_intervall": 2}]}},
        r"cohort\.peers\.0\.update_intervall: unknown setting; did you mean 'update_interval'",
    ),
    ({"train": {"lr": 1}}, r"train\.lr: unknown setting; did you mean 'cohort\.peers\.optimizer"),
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
    ({"cohort": {"peers": [{}, FROZEN]}}, "needs weights from a file that includes its head"),
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


@pytest.mark.parametrize(("raw", "message"), MISTAKES)
def test_mistakes_are_told(raw: dict[str, Any], message: str) -> None:
    """A wrong setting is named with what is allowed, on one line."""
    with pytest.raises(UserError, match=message) as caught:
        Config.parse(raw)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    """Three mistakes in three sections are three lines of one message."""
    raw = {"sede": 1, "train": {"steps": 0}, "data": {"classes_per_batch": 1}}
    with pytest.raises(UserError) as caught:
        Config.parse(raw, source="my.yaml")
    text = str(caught.value)
    assert text.startswith("my.yaml: ")
    for told in ("sede: unknown", "train.steps: ", "data.classes_per_batch: "):
        assert told in text
    assert len(text.strip().splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("train.steps=[1", "not valid YAML"),
        ("cohort.peers.5.seed=1", "cohort.peers has entries 0 to 1, not '5'"),
        ("cohort.peers.x.seed=1", "cohort.peers has entries 0 to 1, not 'x'"),
        ("cohort.peers.-1.seed=1", "cohort.peers has entries 0 to 1, not '-1'"),
        ("train.steps.more=1", "train.steps is 300 and has no settings of its own"),
        ("train.stesp=1", "train.stesp: unknown setting; did you mean 'steps'"),
    ],
)
def test_wrong_overrides_are_told(override: str, message: str) -> None:
    """A --set that cannot be applied says why."""
    with pytest.raises(UserError) as caught:
        Config.load(None, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1\n", "must hold settings .* not a list"),
        ("seed: !!python/object/apply:os.system ['touch HERE']\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    """A file that is no YAML, no mapping, or that would run code is refused by name."""
    file, made = tmp_path / "c.yaml", tmp_path / "made"
    file.write_text(text.replace("HERE", str(made)))
    with pytest.raises(UserError, match=message) as caught:
        Config.load(file)
    assert str(file) in str(caught.value) and not made.exists()
    with pytest.raises(UserError, match="does not exist"):
        Config.load(tmp_path / "other.yaml")
    file.write_text("")
    assert Config.load(file) == Config()


def test_a_config_cannot_be_changed() -> None:
    """Every section is frozen."""
    config = Config()
    for section, name in ((config, "seed"), (config.train, "steps"), (config.cohort, "peers")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_triplet_defaults_belong_to_the_triplet_loss_only() -> None:
    """The default loss has margin 0.2, our miner and the mean reducer, each replaceable; another
    loss has the library's own defaults."""
    default = Config().loss.metric
    assert (default.name, default.args) == ("TripletMarginLoss", {"margin": 0.2})
    assert default.miner == MinerConfig(name="DistanceWeightedNegativeMiner")
    assert default.reducer == "MeanReducer"

    def metric(**given: Any) -> MetricLossConfig:
        return Config.parse({"loss": {"metric": given}}).loss.metric

    assert metric(args={"swap": True}).args == {"margin": 0.2, "swap": True}
    assert metric(args={"margin": 0.1}).args == {"margin": 0.1}
    assert metric(miner=None).miner is None and metric(miner=None).reducer == "MeanReducer"
    other = metric(name="ContrastiveLoss")
    assert (other.args, other.miner, other.reducer) == ({}, None, None)


def test_yaml_out_is_plain(image_folder: Path) -> None:
    """The saved config states every field and holds no Python objects."""
    written = yaml.safe_load(Config.parse(tiny(image_folder)).to_yaml())
    assert set(written["train"]) == set(TrainConfig.model_fields)
    assert set(written["cohort"]["peers"][1]) == set(PeerConfig.model_fields)
    assert "base" not in written["cohort"]


def test_off_is_a_value_of_amp(tmp_path: Path) -> None:
    """Unquoted, as a person writes it, though YAML takes it for false."""
    file = tmp_path / "c.yaml"
    file.write_text("cohort: {base: {amp: off}}\n")
    config = Config.load(file, ["cohort.peers.1.amp=off"])
    assert [peer.amp for peer in config.cohort.peers] == ["off", "off"]
    with pytest.raises(UserError, match="bfloat16"):
        Config.load(file, ["cohort.peers.1.amp=on"])


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    """`1e-4` is a number in a file, in an override and inside free settings; a text of that form
    comes back as a text."""
    file = tmp_path / "c.yaml"
    file.write_text("loss: {metric: {name: A, args: {margin: 1e-1, b: '1e5', '2e0': -.5E+2}}}\n")
    config = Config.load(file, ["loss.metric.args.c=3e2"])
    expected = {"margin": 0.1, "b": "1e5", "2e0": -50.0, "c": 300.0}
    assert config.loss.metric.args == expected
    for text in (config.to_yaml(), documented_yaml(config)):
        file.write_text(text)
        assert Config.load(file).loss.metric.args == expected


def test_settings_by_the_name_of_a_tag_are_unknown_ones() -> None:
    """Pydantic names the two kinds of a view so."""
    for name in ("list", "preset"):
        with pytest.raises(UserError, match=f"{name}: unknown setting"):
            Config.parse({name: None})
    with pytest.raises(UserError, match=r"cohort\.peers\.0\.view\.0\.name"):
        Config.parse({"cohort": {"peers": [{"view": [{}]}]}})
