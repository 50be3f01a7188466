"""What is said about GPUs, for each way in which they may be missing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ray_dmml.doctor.gpus import Driver, Gpu, Torch, gpus, read_driver, read_torch

DRIVER = Driver("550.54.15", (12, 4), 2)
H100 = Gpu("NVIDIA H100", 80 * 2**30, "sm_90")
TORCH = Torch("2.7.0+cu126", "CUDA 12.6", ("sm_80", "sm_90", "compute_90"), (H100, H100))
NO_GPUS = replace(TORCH, gpus=())


def test_gpus_that_can_be_used() -> None:
    check = gpus(TORCH, DRIVER)
    assert check.state == "ok" and check.advice is None
    assert check.message == (
        "2 x NVIDIA H100 (80.0 GiB); driver 550.54.15 (CUDA up to 12.4); torch is built for CUDA 12.6"
    )
    assert check.facts["gpus"][1] == {"name": "NVIDIA H100", "bytes": 80 * 2**30, "architecture": "sm_90"}


@pytest.mark.parametrize(
    ("torch", "driver", "visible", "words"),
    [
        (Torch("2.7.0+cpu"), Driver(), None, "none: peers train on the CPU"),
        (Torch("2.7.0+cpu"), DRIVER, None, "torch 2.7.0.cpu is a build for CPUs"),
        (NO_GPUS, DRIVER, "", "CUDA_VISIBLE_DEVICES= hides all GPUs"),
        (NO_GPUS, DRIVER, "-1", "CUDA_VISIBLE_DEVICES=-1 hides all GPUs"),
        (
            NO_GPUS,
            replace(DRIVER, cuda=(11, 4)),
            None,
            "is too old for torch 2.7.0.cu126, which is built for CUDA 12.6",
        ),
        (NO_GPUS, replace(DRIVER, num_devices=0), None, "but no device"),
        (replace(NO_GPUS, reason="system not yet initialized"), DRIVER, "0", "cannot use them: .*not yet initialized"),
    ],
)
def test_gpus_that_cannot_be_used(torch: Torch, driver: Driver, visible: str | None, words: str) -> None:
    """A run then trains on the CPU: a note that says why and what to do."""
    check = gpus(torch, driver, visible)
    assert check.state == "note" and check.advice
    assert re.search(words, check.message)


@pytest.mark.parametrize(
    ("architecture", "kernels", "runs"),
    [
        ("sm_86", ("sm_80",), True),
        ("sm_90", ("sm_80", "sm_86"), False),
        ("sm_120", ("sm_90", "compute_90"), True),
        ("sm_70", ("sm_75", "compute_75"), False),
        ("gfx942", (), True),
    ],
)
def test_kernels_for_a_gpu(architecture: str, kernels: tuple[str, ...], runs: bool) -> None:
    """Without them every operation on the GPU fails, and so does a run."""
    check = gpus(Torch("2.7", "CUDA 12.6", kernels, (Gpu("a GPU", 2**33, architecture),)), DRIVER)
    assert check.state == ("ok" if runs else "problem")


def test_the_driver_is_read_from_the_files_of_the_system(tmp_path: Path) -> None:
    assert read_driver(tmp_path / "none", tmp_path / "none").version is None
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
    )
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    driver = read_driver(tmp_path, tmp_path)
    assert (driver.version, driver.num_devices) == ("550.54.15", 2)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n"
    )
    assert read_driver(tmp_path, tmp_path).version == "570.86.10"


def test_torch_is_asked() -> None:
    import torch

    found = read_torch()
    assert found.version == torch.__version__ and len(found.gpus) == torch.cuda.device_count()
