"""The examples run as scripts, with small settings."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same

from ray_dmml import relational_losses
from ray_dmml.config.code import use_code

EXAMPLES = Path(__file__).parents[2] / "examples"

Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs an example in an empty folder; returns its global names and what it has printed."""

    def run_example(name: str, *arguments: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        found = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return found, capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        yield run_example
    use_code({})


def test_the_readme_lists_every_example() -> None:
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} <= listed


def test_dm2_in_plain_pytorch_equals_a_local_cohort(run: Run) -> None:
    """To the bit: weights and BatchNorm statistics after updates at every step, and at every second one."""
    names, printed = run("dm2_in_plain_pytorch.py", "--steps", "6", "--classes", "4")
    for number, (peer, net) in enumerate(zip(names["plain"], names["package"], strict=True)):
        expected = net.state_dict()
        assert_same(dict(peer.state_dict()), dict(expected), f"peer{number}")
        assert f"peer{number}: {len(expected)} of {len(expected)} tensors are equal to the bit" in printed


def test_the_distillation_that_is_written_out_is_that_of_the_package() -> None:
    """Its values and its gradient."""
    written_out = runpy.run_path(str(EXAMPLES / "dm2_in_plain_pytorch.py"))["relational_distillation"]
    student = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, 7, dtype=torch.float64)
    gradients = []
    for terms in (written_out(student, teacher), relational_losses(student, [teacher])):
        gradients.append([*terms, *torch.autograd.grad(terms[0] + 2 * terms[1], student)])
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_own_loss_and_data(run: Run) -> None:
    """A run whose loss and images are of the script; of every peer it prints figures before and after."""
    small = ["train.steps=2", "train.report=false", "data.args.train_on=8", "train.tensorboard=false"]
    small += [f"cohort.peers.{n}.backbone=test_resnet" for n in (0, 1)]
    names, printed = run("own_loss_and_data.py", "runs/digits", *small, "--local")
    assert Path("runs/digits/results.json").exists()
    assert names["results"]["num_classes"] == 2
    assert re.findall(r"^(\w+): Recall@1 of unseen digits [\d.]+% -> [\d.]+%$", printed, re.M) == [
        "peer0",
        "peer1",
        "ensemble",
    ]


def test_relational_loss_in_pml(run: Run) -> None:
    """The networks learn from each other, and with a weight of 0 they do not."""
    small = ["--batches", "2", "--classes", "17"]
    printed = [run("relational_loss_in_pml.py", *small, "--weight", weight)[1] for weight in ("0", "10")]
    assert printed[0] != printed[1]
    for lines in printed:
        found = re.findall(r"^(\S+): Recall@1 of unseen characters ([\d.]+)%$", lines, re.M)
        assert [name for name, _ in found] == ["64-d", "32-d", "both"]
        assert all(float(percent) > 20 for _, percent in found)  # by chance it is 6 %


def test_sampler_in_dataloader(run: Run) -> None:
    """Every image is in an epoch, batches hold no image twice, and a resumed epoch goes on with the same ones."""
    _, printed = run("sampler_in_dataloader.py")
    assert re.search(r"^ClassBalancedSampler: .* have 330 of 330 images\n.* in a batch: 20$", printed, re.M)
    assert "equal batches: True" in printed


def test_use_the_ensemble(run: Run, small_run: Path, image_folder: Path) -> None:
    """For each of the first images it names three others, the most similar first."""
    _, printed = run("use_the_ensemble.py", str(small_run), str(image_folder))
    lines = printed.splitlines()
    queries = [line for line in lines if not line.startswith(" ")]
    assert len(queries) == 5 and len(lines) == 20
    for start in range(0, 20, 4):
        found = [re.fullmatch(r" +(-?[\d.]+)  (.+)", line) for line in lines[start + 1 : start + 4]]
        similarities = [float(match[1]) for match in found if match]
        assert len(similarities) == 3 and similarities == sorted(similarities, reverse=True)
        assert lines[start] not in [match[2] for match in found if match]
