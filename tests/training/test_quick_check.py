"""Mistakes that are seen without torch: a wrong path or name is refused, and every right one is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import tiny

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.training.quick_check import check_quickly

LONG = "/" + "x" * 300  # no file can have this name


def check(
    root: Path,
    *,
    on_this_machine: bool = True,
    reads_weights: bool = True,
    base: dict[str, Any] | None = None,
    **changes: Any,
) -> None:
    raw = tiny(root, **changes)
    raw["cohort"]["base"] |= base or {}
    check_quickly(Config.parse(raw), on_this_machine=on_this_machine, reads_weights=reads_weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"root": "/no/where"}}, "data.root /no/where is not an existing folder"),
        ({"data": {"name": "manifest", "manifest": "/no/list.csv"}}, "data.manifest /no/list.csv is not an existing"),
        ({"train": {"init_from": "/no/run"}}, "/no/run is not the folder of a run"),
        ({"base": {"weights": "/no/file.pth"}}, "weights file /no/file.pth does not exist"),
        ({"data": {"root": LONG}}, "data.root /x+ is not an existing folder"),
        ({"data": {"name": "manifest", "manifest": LONG}}, "data.manifest /x+ is not an existing"),
        ({"base": {"weights": LONG}}, "weights file /x+ does not exist"),
        ({"code": [f"{LONG}.py"]}, "code: /x+.py is neither a Python file"),
        ({"base": {"backbone": "resnet_50"}}, "unknown backbone 'resnet_50'.*did you mean .*resnet50"),
        ({"base": {"view": [{"name": "RandomKrop"}]}}, "unknown transform 'RandomKrop'; did you mean RandomCrop"),
        ({"loss": {"metric": {"name": "TripletLoss"}}}, "no loss 'TripletLoss'; did you mean"),
        ({"loss": {"metric": {"miner": {"name": "HardMiner"}}}}, "no miner 'HardMiner'; did you mean"),
        ({"loss": {"metric": {"reducer": "MeanReduce"}}}, "no reducer 'MeanReduce'; did you mean MeanReducer"),
    ],
)
def test_a_mistake(image_folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(image_folder, **change)


def test_what_is_right_passes(image_folder: Path) -> None:
    """All names of timm, with and without a tag; parts and hubs of the user; files of other machines."""
    names = [
        *timm.list_models()[::40],
        *timm.list_pretrained()[::80],
        "hf-hub:timm/resnet18.a1_in1k",
        "torch.nn:Identity",
        "wsgiref.headers:Headers",  # in no text of timm
    ]
    peers = [{"backbone": name, "seed": place} for place, name in enumerate(names)]
    check(image_folder, cohort={**tiny(image_folder)["cohort"], "peers": peers})
    check(image_folder, on_this_machine=False, base={"weights": "/on/the/nodes.pth"})
    check(image_folder, base={"view": [{"name": "RandomCrop"}, {"name": "torch.nn:Identity"}]})
    for loss in ("ProxyAnchorLoss", "torch.nn:Identity"):
        check(image_folder, loss={"metric": {"name": loss, "miner": {"name": "TripletMarginMiner"}}})


def test_weights_that_are_not_read_need_not_be_there(image_folder: Path, tmp_path: Path) -> None:
    """Those of a run with a checkpoint, and the peers' own beside those of another run."""
    gone = {"base": {"weights": "/no/file.pth"}}
    check(image_folder, reads_weights=False, train={"init_from": "/no/run"}, **gone)
    (tmp_path / "config.yaml").touch()
    check(image_folder, train={"init_from": str(tmp_path)}, **gone)


@pytest.mark.ray
def test_it_needs_no_torch() -> None:
    """Its import, and the check of the quickstart, load neither torch nor Ray."""
    script = (
        "import sys; from ray_dmml.training.quick_check import check_quickly; from ray_dmml import Config; "
        "check_quickly(Config.load(), on_this_machine=True); assert not {'torch', 'ray', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
