"""Examines this machine: reads what the checks need, and makes them."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ray_dmml.config.schema import Config
from ray_dmml.cores import num_cores
from ray_dmml.data.cache_folder import default_folder
from ray_dmml.doctor import gpus, libraries, machine, ray_files
from ray_dmml.doctor.check import Check
from ray_dmml.doctor.environment import environment

SHARED_MEMORY = Path("/dev/shm")


def examine(config: Config | None = None) -> Iterator[Check]:
    """The checks, one after the other. No process is started, and no memory of a GPU is taken.

    Args:
        config: also check whether its peers have room here.
    """
    yield from _libraries()
    gpu = _gpus()
    yield gpu
    yield _faiss()
    num_usable = num_cores()
    yield machine.cores(num_usable, os.cpu_count() or 1)
    if gpu.name == "GPUs":
        import torch

        yield machine.threads(torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"), num_usable)
    yield from _memory()
    yield machine.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield machine.tasks(*machine.container_tasks())
    temporary, folder = ray_files.temporary_folder(os.environ)
    yield temporary
    if folder is not None:
        sockets = ""
        with suppress(OSError):
            sockets = ray_files.SOCKETS.read_text(errors="replace")
        yield ray_files.sessions(ray_files.read_sessions(folder, sockets))
    yield machine.runs_folder(Path.cwd())
    yield machine.caches(_caches(), Config().data.cache_gib)
    yield environment(os.environ)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield ray_files.cluster(address)
    if config is not None and not address:
        from ray_dmml.doctor.placement import fits

        yield fits(config, {"CPU": num_usable, **({"GPU": num} if (num := len(gpu.facts.get("gpus", ()))) else {})})


def _libraries() -> Iterator[Check]:
    needed = libraries.requirements_of(libraries.PACKAGE)
    vision = libraries.requirements_of("torchvision")
    installed = libraries.installed_versions(
        {*libraries.SHOWN, *(requirement.name for requirement in [*needed, *vision])}
    )
    faults = {"ray-dmml": libraries.unmet(needed, installed), "torchvision": libraries.unmet(vision, installed)}
    yield libraries.versions(platform.python_version(), installed, faults)
    absent = [name for name in libraries.extras_of(needed) if libraries.unmet(needed, installed, name)]
    yield libraries.extras([name for name in libraries.extras_of(needed) if name not in absent], absent)


def _gpus() -> Check:
    try:
        torch = gpus.read_torch()
    except (ImportError, OSError) as error:  # a library that it is linked to is missing
        return libraries.broken("torch", error)
    return gpus.gpus(torch, gpus.read_driver(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _faiss() -> Check:
    try:
        level = libraries.faiss_level()
    except (ImportError, OSError) as error:
        return libraries.broken("faiss-cpu", error)
    flags = set[str]()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), flags)
    return libraries.faiss(level, flags)


def _memory() -> Iterator[Check]:
    """Nothing where the system does not show it, as on macOS."""
    with suppress(OSError, KeyError):
        total, available = machine.machine_memory(Path("/proc/meminfo").read_text())
        limit = machine.container_memory()
        is_limited = limit is not None and limit[0] < total
        if limit is not None and is_limited:
            total, available = limit[0], min(available, limit[1])
        yield machine.memory(total, available, is_limited)
        disk = shutil.disk_usage(SHARED_MEMORY)
        yield machine.shared_memory(disk.total, disk.free, available)


def _caches() -> list[machine.Kept]:
    """ray-dmml's own, that of the Hugging Face hub, from which timm has its weights, and that of torch."""
    found = []
    with suppress(OSError):  # there is no home folder
        found.append(machine.Kept("ray-dmml", default_folder()))
    with suppress(ImportError, RuntimeError):
        from huggingface_hub.constants import HF_HUB_CACHE

        found.append(machine.Kept("Hugging Face hub", Path(HF_HUB_CACHE)))
    with suppress(ImportError, OSError, RuntimeError):
        from torch.hub import get_dir

        found.append(machine.Kept("torch hub", Path(get_dir())))
    return found
