"""The written config: every form can be loaded again, and every setting has a meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from conftest import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_dmml.config import schema
from ray_dmml.config.document import documented_yaml
from ray_dmml.config.loading import BUILT_IN_WEIGHTS
from ray_dmml.config.schema import Config, PeerConfig, Section, TrainConfig

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8)
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
        # `~name` of an unknown user and an empty path are errors; other tests cover them.
        "weights": TEXT.filter(lambda text: text and not text.startswith("~")),
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
        "data": st.fixed_dictionaries({"name": st.just("imagefolder"), "root": st.just("/some where/# images")}),
        "loss": st.fixed_dictionaries({"metric": METRIC}),
        "evaluation": st.fixed_dictionaries({"recall_at": st.lists(st.integers(1, 9), min_size=1, max_size=3)}),
    },
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIG)
def test_every_config_survives_yaml(tmp_path_factory: Any, raw: dict[str, Any]) -> None:
    """`load` reads the same config from `to_yaml` and from the documented form."""
    config = Config.parse(raw)
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    for text in (config.to_yaml(), documented_yaml(config)):
        file.write_text(text, encoding="utf-8")
        # Paths of weights become absolute: relative ones start at the config's own folder.
        expected = [
            peer.weights
            if peer.weights in ("", *BUILT_IN_WEIGHTS)
            else str(file.parent / Path(peer.weights).expanduser())
            for peer in config.cohort.peers
        ]
        loaded = Config.load(file)
        assert [peer.weights for peer in loaded.cohort.peers] == expected
        peers = tuple(
            peer.model_copy(update={"weights": old.weights})
            for peer, old in zip(loaded.cohort.peers, config.cohort.peers, strict=True)
        )
        cohort = loaded.cohort.model_copy(update={"peers": peers})
        assert loaded.model_copy(update={"cohort": cohort}) == config


def test_every_setting_is_documented(image_folder: Path) -> None:
    """Each field of each section has a docstring, and `ray-dmml config` prints all of them."""
    raw = tiny(image_folder)
    raw["cohort"]["base"] |= {"ema": {}, "lora": {}}
    raw["cohort"]["peers"][0] = {"view": [{"name": "RandomResizedCrop"}]}
    raw["loss"] = {"mutual": [{"name": "parts:Term"}]}
    raw["train"]["loggers"] = [{"name": "parts:MyLogger"}]
    printed = " ".join(documented_yaml(Config.parse(raw)).replace("#", " ").split())
    sections = [s for s in Section.__subclasses__() if s.__module__ == schema.__name__]
    assert len(sections) >= 16
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            meaning = " ".join(field.description.split()).replace("#", " ")
            assert meaning in printed, f"{section.__name__}.{name}"


def test_comments_fit_a_terminal(image_folder: Path) -> None:
    """They are wrapped, and peers after the first do not repeat them."""
    text = documented_yaml(Config.parse(tiny(image_folder)))
    assert max(len(line) for line in text.splitlines() if "# " in line) <= 90
    assert text.count("Any timm model name") == 1


def test_yaml_out_is_plain(image_folder: Path) -> None:
    """The saved config states every field and contains no Python objects."""
    written = yaml.safe_load(Config.parse(tiny(image_folder)).to_yaml())
    assert set(written["train"]) == set(TrainConfig.model_fields)
    assert set(written["cohort"]["peers"][1]) == set(PeerConfig.model_fields)
    assert "base" not in written["cohort"]
