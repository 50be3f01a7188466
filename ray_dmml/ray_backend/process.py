"""What every process of a peer sets up before it computes."""

from __future__ import annotations

import ctypes
import gc
import socket

import ray
import torch

from ray_dmml.config.code import Files, use_code
from ray_dmml.config.parts import require_parts
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import UserError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def prepare_process(threads: int) -> None:
    """Sets torch's threads and the C library's memory management."""
    torch.set_num_threads(threads)
    tune_malloc()


def use_parts(config: Config, code: Files) -> None:
    """Makes the files of the setting `code` importable. Raises UserError, with the name of this host, if an own part of
    the config is missing here."""
    try:
        use_code(code)
        require_parts(config, loggers=False)  # they are in the process that started the run
    except UserError as error:
        raise UserError(f"on host {socket.gethostname()} ({ray.util.get_node_ip_address()}): {error}") from error


def tune_malloc() -> None:
    """Makes the C library keep freed memory for the next step. By default glibc returns blocks of the size of
    activations to the system, and the kernel clears their pages again at every step, a fourth of its time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    # Before 2.35 glibc refuses more than 32 MiB. With no threshold set the other options do harm.
    if not mallopt(_M_MMAP_THRESHOLD, 2**30) and not mallopt(_M_MMAP_THRESHOLD, 2**25):
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)


def free_memory() -> None:
    """Gives the device back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def device_of(peer: PeerConfig) -> torch.device:
    """The GPU that Ray gave this actor, which is the only one it sees, or else the CPU. Raises UserError if the config
    asks for GPUs that torch cannot use."""
    if ray.get_gpu_ids():
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        if peer.num_gpus:
            raise UserError(
                f"{peer.name}: num_gpus is {peer.num_gpus:g} and Ray found a GPU, but this torch "
                f"({torch.__version__}) cannot use it: install a CUDA build and the driver"
            )
    return torch.device("cpu")
