"""The devices of this machine, one for each run."""

from __future__ import annotations

import os

import ray
import torch

from ray_dmml.cores import num_cores
from ray_dmml.errors import UserError

from .hours import Speed, time_steps
from .plan import Plan


class Machine:
    """Runs side by side, each with one GPU, or without a GPU with one core.

    Args:
        asked: number of GPUs; None: all; 0: the CPU.

    Raises:
        UserError: there are not so many GPUs, or Ray would make the runs on a cluster.
    """

    def __init__(self, asked: int | None) -> None:
        if os.environ.get("RAY_ADDRESS"):
            raise UserError("RAY_ADDRESS is set, and the runs are made on this machine: unset it")
        gpus = torch.cuda.device_count()
        if asked is not None and asked > gpus:
            raise UserError(f"--gpus is {asked}, and this machine has {gpus} GPUs")
        if asked == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else each process would take the first GPU
        gpus = gpus if asked is None else asked
        self.device = "GPU" if gpus else "core"
        self.num_devices = gpus or num_cores()
        self.cores = max(1, num_cores() // self.num_devices)
        """Of each run."""
        self.resources: dict[str, float] = {"num_cpus": self.cores, "num_gpus": 1 if gpus else 0}

    def speed(self, plan: Plan) -> Speed:
        """Of a few steps now. It needs a session of Ray."""
        return ray.get(ray.remote(max_retries=0, **self.resources)(time_steps).remote(plan, self.cores))

    def shown(self) -> str:
        return f"{self.num_devices} {self.device}{'' if self.num_devices == 1 else 's'}"
