"""Config files: overrides, relative paths, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.config.document import documented_yaml
from ray_dmml.config.loading import refuse_old, set_setting
from ray_dmml.config.schema import Config, OptimizerConfig
from ray_dmml.errors import UserError
from ray_dmml.training.run_dir import RunDir
from ray_dmml.tune.results import SearchDir


def test_overrides_reach_everything(tmp_path: Path) -> None:
    """Overrides set nested keys, list entries, whole sections, and peers that the file does not list."""
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("train.steps=[1", "not valid YAML"),
        ("cohort.peers.5.seed=1", "cohort.peers has entries 0 to 1, not '5'"),
        ("cohort.peers.x.seed=1", "cohort.peers has entries 0 to 1, not 'x'"),
        ("cohort.peers.-1.seed=1", "cohort.peers has entries 0 to 1, not '-1'"),
        ("cohort.peers.².seed=1", "cohort.peers has entries 0 to 1, not '²'"),
        (f"cohort.peers.{'1' * 5000}.seed=1", "cohort.peers has entries 0 to 1, not '111"),
        ("train.steps.more=1", "train.steps is 300 and has no settings of its own"),
        ("train.stesp=1", "train.stesp: unknown setting; did you mean 'steps'"),
    ],
)
def test_wrong_overrides_are_refused(override: str, message: str) -> None:
    """The message says why the override cannot be applied."""
    with pytest.raises(UserError) as caught:
        Config.quickstart([override])
    assert message in str(caught.value)


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in a file are relative to its folder, those in an override to the current one."""
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1\n", "must hold settings .* not a list"),
        ("seed: !!python/object/apply:os.system ['touch HERE']\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    """A file that is not YAML, that is no mapping, or that would run code is refused."""
    file, made = tmp_path / "c.yaml", tmp_path / "made"
    file.write_text(text.replace("HERE", str(made)))
    with pytest.raises(UserError, match=message) as caught:
        Config.load(file)
    assert str(file) in str(caught.value) and not made.exists()
    with pytest.raises(UserError, match="does not exist"):
        Config.load(tmp_path / "other.yaml")
    file.write_text("")
    assert Config.load(file) == Config()


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    """`1e-4` is a number in a file, in an override and in free settings. A quoted one remains text."""
    file = tmp_path / "c.yaml"
    file.write_text("loss: {metric: {name: A, args: {margin: 1e-1, b: '1e5', '2e0': -.5E+2}}}\n")
    config = Config.load(file, ["loss.metric.args.c=3e2"])
    expected = {"margin": 0.1, "b": "1e5", "2e0": -50.0, "c": 300.0}
    assert config.loss.metric.args == expected
    for text in (config.to_yaml(), documented_yaml(config)):
        file.write_text(text)
        assert Config.load(file).loss.metric.args == expected


def test_a_dollar_sign_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a value is replaced, not even what other tools take for a variable."""
    monkeypatch.setenv("SECRET", "leaked")
    file = tmp_path / "c.yaml"
    file.write_text("loss: {metric: {name: A, args: {a: '${oc.env:SECRET}', b: '${', c: $SECRET}}}\n")
    args = Config.load(file, ["loss.metric.args.d=${seed}"]).loss.metric.args
    assert args == {"a": "${oc.env:SECRET}", "b": "${", "c": "$SECRET", "d": "${seed}"}


def test_setting_part_of_a_value_is_refused() -> None:
    """A number has no settings, and it is not replaced by a mapping."""
    raw = {"train": {"steps": 5}}
    with pytest.raises(UserError, match=r"^here: train\.steps is 5 and has no settings of its own$"):
        set_setting(raw, "train.steps.a.b", 1, "here")
    assert raw == {"train": {"steps": 5}}


@pytest.mark.parametrize("old", [{"run": {"max_restarts": 5}}, {"cohort": {"placement": "pack"}}])
def test_settings_of_an_older_version_are_refused(old: dict[str, Any], tmp_path: Path) -> None:
    """In one sentence that names the file."""
    file = tmp_path / "config.yaml"
    refuse_old(Config().model_dump(mode="json"), file)
    with pytest.raises(UserError) as refused:
        refuse_old(old, file)
    assert str(refused.value) == (
        f"{file} was written by an older version of ray-dmml, whose runs this version cannot read; train it again"
    )


def test_a_run_of_an_older_version_is_refused(tmp_path: Path) -> None:
    """By whoever reads its stored config."""
    (tmp_path / "config.yaml").write_text("run: {max_restarts: 5}\n")
    with pytest.raises(UserError, match=r"config\.yaml was written by an older version"):
        RunDir.open(tmp_path).config()
    resumed = CliRunner().invoke(app, ["train", "--local", "--resume", str(tmp_path)])
    assert resumed.exit_code != 0 and "was written by an older version" in resumed.output
    (tmp_path / "search.yaml").write_text("settings: {run: {max_restarts: 5}}\nsearch: {}\n")
    with pytest.raises(UserError, match=r"search\.yaml was written by an older version"):
        SearchDir(tmp_path).search()
