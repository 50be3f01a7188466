"""Runs in folders of their own, which are resumed after an interruption."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ray_dmml import Config, train
from ray_dmml.training.provenance import cpu
from ray_dmml.training.run_dir import RunDir


def run_folder(config: Config, folder: Path) -> tuple[dict[str, Any], float]:
    """The results of a run, which is read if it has finished and resumed if it was stopped; and its seconds. All its
    peers train in this process, which gives the numbers of a cohort on Ray to the bit."""
    logging.getLogger("ray_dmml").setLevel(logging.ERROR)
    run, began = RunDir(folder), time.perf_counter()
    if (results := run.results()) is not None:
        return results, 0.0
    if run.exists():
        return train(resume=folder, local=True, progress=False), time.perf_counter() - began
    shutil.rmtree(folder, ignore_errors=True)
    return train(config, folder, local=True, progress=False), time.perf_counter() - began


def device_name(device: torch.device | None = None) -> str:
    """The model of the GPU or CPU, because figures of two models differ by more than rounding. Without an argument: the
    one that this process trains on."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else cpu()
