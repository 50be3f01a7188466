"""Check of the GPUs: what the driver has, and what torch can use of it."""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_dmml.doctor.check import Check, State, counted, size

ON_CPU = "peers train on the CPU"


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    num_bytes: int
    architecture: str
    """Such as ``sm_90``."""


@dataclass(frozen=True)
class Driver:
    """What there is of NVIDIA's driver."""

    version: str | None = None
    """Such as ``550.54.15``; None: its file is not there, as in WSL."""

    cuda: tuple[int, int] | None = None
    """The newest CUDA that it can run; None: its library is not there."""

    num_devices: int = 0
    """Device files."""

    def __str__(self) -> str:
        cuda = f"CUDA up to {self.cuda[0]}.{self.cuda[1]}" if self.cuda else "no libcuda"
        return f"driver {self.version or 'of unknown version'} ({cuda})"


@dataclass(frozen=True)
class Torch:
    """What torch says about GPUs."""

    version: str
    built_for: str | None = None
    """``CUDA 12.8``; None: it is a build for CPUs."""

    architectures: tuple[str, ...] = ()
    """Those that it has kernels for, such as ``sm_90`` and ``compute_90``."""

    gpus: tuple[Gpu, ...] = ()
    reason: str | None = None
    """Why there are none, in torch's words."""


def gpus(torch: Torch, driver: Driver, visible: str | None = None) -> Check:
    """What peers train on.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``.
    """
    facts = {
        "gpus": [{"name": gpu.name, "bytes": gpu.num_bytes, "architecture": gpu.architecture} for gpu in torch.gpus],
        "driver": driver.version,
        "driver_cuda": driver.cuda and f"{driver.cuda[0]}.{driver.cuda[1]}",
        "torch_built_for": torch.built_for,
    }

    def found(message: str, advice: str | None = None, *, is_problem: bool = False) -> Check:
        state: State = "problem" if is_problem else "note" if advice else "ok"
        return Check(name="GPUs", state=state, message=message, advice=advice, facts=facts)

    if torch.gpus:
        names = [f"{gpu.name} ({size(gpu.num_bytes)})" for gpu in torch.gpus]
        message = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        message += f"; {driver}; torch is built for {torch.built_for}"
        foreign = sorted({gpu.architecture for gpu in torch.gpus if not _runs_on(gpu.architecture, torch)})
        if foreign:
            message += f", without kernels for {', '.join(foreign)}"
            return found(message, "Install a torch that is built for this GPU: pytorch.org.", is_problem=True)
        return found(message)
    if driver == Driver():
        return found(f"none: {ON_CPU}", "The quickstart is made for CPUs. Train larger networks on a GPU.")
    if torch.built_for is None:
        message = f"{driver}, but torch {torch.version} is a build for CPUs: {ON_CPU}"
        return found(message, "Install a CUDA build of torch and torchvision (pytorch.org), not newer than the driver.")
    if visible is not None and visible.strip() in ("", "-1"):
        message = f"{driver}; CUDA_VISIBLE_DEVICES={visible} hides all GPUs: {ON_CPU}"
        return found(message, "Unset CUDA_VISIBLE_DEVICES.")
    if driver.cuda and driver.cuda[0] < _major(torch.built_for):
        message = f"{driver} is too old for torch {torch.version}, which is built for {torch.built_for}: {ON_CPU}"
        return found(message, "Update the driver, or install a torch that is built for its CUDA (pytorch.org).")
    if not driver.num_devices:
        message = f"{driver}, but no device: {ON_CPU}"
        return found(message, "Give the container or job a GPU (docker run --gpus all; sbatch --gpus).")
    message = (
        f"{driver} and {counted(driver.num_devices, 'device')}, but torch {torch.version} cannot use them: {ON_CPU}"
    )
    return found(f"{message} ({torch.reason})" if torch.reason else message, "See whether nvidia-smi works.")


def _major(built_for: str) -> int:
    digits = re.search(r"\d+", built_for)
    return int(digits[0]) if digits else 0


def _runs_on(architecture: str, torch: Torch) -> bool:
    """A kernel runs on later GPUs of the same major version, and the intermediate code (``compute_..``) on all later
    ones."""
    if not architecture.startswith("sm_") or not torch.architectures:
        return True  # another maker's GPU
    own = _number(architecture)
    return any(
        _number(kernel) <= own and (kernel.startswith("compute_") or _number(kernel) // 10 == own // 10)
        for kernel in torch.architectures
    )


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture) or 0)


def read_torch() -> Torch:
    """Asks torch. No memory of a GPU is taken.

    Raises:
        ImportError, OSError: torch cannot be imported.
    """
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    if torch.version.hip:
        built_for = f"ROCm {torch.version.hip}"
    found, reason = [], None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                facts = torch.cuda.get_device_properties(number)
                found.append(Gpu(facts.name, facts.total_memory, f"sm_{facts.major}{facts.minor}"))
        elif built_for:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                reason = str(error).strip().split(". ")[0].splitlines()[0]
    if reason is None and said and not found:
        reason = str(said[0].message).split(". ")[0]
    architectures = tuple(torch.cuda.get_arch_list()) if found and not torch.version.hip else ()
    return Torch(str(torch.__version__), built_for, architectures, tuple(found), reason)


def read_driver(proc: Path = Path("/proc/driver/nvidia"), dev: Path = Path("/dev")) -> Driver:
    """What the system shows of NVIDIA's driver."""
    version, cuda = None, None
    with suppress(OSError):
        number = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", (proc / "version").read_text())
        version = number and number[1]
    with suppress(OSError, AttributeError):
        library, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(answer)) == 0 and answer.value:
            cuda = (answer.value // 1000, answer.value % 1000 // 10)
    devices = [name for name in os.listdir(dev) if re.fullmatch(r"nvidia\d+|dxg", name)] if dev.is_dir() else []
    return Driver(version, cuda, len(devices))
