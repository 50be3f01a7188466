"""Runs whose config names own parts: resumed and evaluated with them, and never without the user's consent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from ray_dmml import Config, UserError, distill, evaluate, load_cohort, train
from ray_dmml.config.code import use_code
from ray_dmml.training.distill import distillation_config

SOURCE = Path(__file__).parents[1] / "cohort/parts_source.py"
LOGGER = """

class Heard(Logger):
    def __init__(self, config, folder):
        self.folder, self.steps = folder, []
    def log(self, metrics, step):
        if "peers" in metrics:
            (self.folder / "heard.txt").write_text(f"{step}")
"""


@pytest.fixture
def run(image_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A finished run of 2 steps."""
    (tmp_path / "outside_parts.py").write_text("from ray_dmml import Logger\n" + SOURCE.read_text() + LOGGER)
    raw = tiny(image_folder, train={"steps": 2, "tensorboard": False, "loggers": [{"name": "outside_parts:Heard"}]})
    raw["code"] = [str(tmp_path / "outside_parts.py")]
    raw["loss"] = {"metric": {"name": "outside_parts:Pairs"}}
    raw["cohort"]["peers"] = [{"backbone": "outside_parts:Blocks", "backbone_args": {"width": 4}}, {}]
    train(Config.parse(raw), tmp_path / "run", local=True)
    use_code({})
    yield tmp_path / "run"
    use_code({})


def test_code_of_a_run_needs_consent(run: Path) -> None:
    """To evaluate it, or to load its nets. Then the figures are those of the run."""
    assert (run / "heard.txt").read_text() == "2"
    with pytest.raises(UserError, match=r"outside_parts:Pairs \(loss.metric.name\).*--trust-code"):
        evaluate(run)
    with pytest.raises(UserError, match=r"outside_parts:Blocks \(cohort.peers.0.backbone\); .*trust_code=True"):
        load_cohort(run)
    results = evaluate(run, trust_code=True)
    cohort = load_cohort(run, trust_code=True)
    assert results["peers"]["peer0"].keys() > {"recall@1", "recall@2", "map@r", "r_precision"}
    embeddings = cohort.embed(torch.zeros(2, 3, 36, 36, dtype=torch.uint8))
    assert embeddings.shape == (2, 32) and np.allclose(np.linalg.norm(embeddings, axis=1), 1)


def test_a_run_goes_on_with_its_code_elsewhere(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the file is may change; a file that is gone is named, and one with another content is warned of."""
    file = tmp_path / "outside_parts.py"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(file, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"^code: .*outside_parts.py is neither a Python file"):
        train(resume=run, local=True)
    config = Config.load(run / "config.yaml", [f"code=[{tmp_path}/elsewhere/outside_parts.py]", "train.steps=4"])
    assert train(config, resume=run, local=True)["step"] in (2, 3, 4)
    assert (run / "heard.txt").read_text() == "4"
    assert "changed since" not in caplog.text
    moved = tmp_path / "elsewhere/outside_parts.py"
    moved.write_text(moved.read_text() + "# edited\n")
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 5})}), resume=run, local=True)
    assert "outside_parts.py: changed since the run started" in caplog.text


def test_a_distillation_needs_consent(run: Path, tmp_path: Path) -> None:
    """Its loss, its loggers and its teachers are those of the run."""
    with pytest.raises(UserError, match=r"outside_parts:Pairs \(loss.metric.name\).*--trust-code"):
        distillation_config(run, "test_resnet")
    results = distill(run, "test_resnet", tmp_path / "student", local=True, progress=False, trust_code=True)
    assert list(results["peers"]) == ["student", "peer0", "peer1"]
    assert (tmp_path / "student/heard.txt").read_text() == "2"


def test_code_that_nothing_names_is_left_out(run: Path) -> None:
    own = {"train.loggers": [], "loss.metric": {}, "cohort.peers.1.backbone": "test_resnet"}
    made = distillation_config(run, "test_resnet", overrides={**own, "cohort.peers.1.backbone_args": {}})
    assert made.code == ()
