"""Check of environment variables that change what a run does."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ray_dmml.doctor.check import Check, State

PREFIXES = ("RAY_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "MKL_", "KMP_", "TORCH", "PYTORCH_", "HF_", "FAISS_", "TUNE_")
NAMES = {"TMPDIR", "XDG_CACHE_HOME", "CXX", "PYTHONPATH", "LD_PRELOAD"}
SET_BY_US = {"HF_HUB_DISABLE_TELEMETRY"}
SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY")

NOTES = {
    "CUDA_LAUNCH_BLOCKING": "Unset CUDA_LAUNCH_BLOCKING: with it, each operation on a GPU waits for the one before.",
    "HF_HUB_OFFLINE": "With HF_HUB_OFFLINE, weights that are not in the cache cannot be fetched.",
    "NCCL_P2P_DISABLE": "Unset NCCL_P2P_DISABLE: with it, GPUs exchange embeddings through the memory of the machine.",
}
"""What to know of variables that are set to anything but nothing, 0 or false."""


def environment(variables: Mapping[str, str]) -> Check:
    """Variables that are set, without secrets, and which of them limit a run."""
    facts = {
        name: "(secret)" if any(word in name for word in SECRET) and not name.endswith("_PATH") else value
        for name, value in sorted(variables.items())
        if name in NAMES or (name.startswith(PREFIXES) and name not in SET_BY_US)
    }
    message = ", ".join(f"{name}={value}" for name, value in facts.items()) or "nothing that changes a run"
    token = variables.get("RAY_AUTH_TOKEN_PATH")
    if variables.get("RAY_AUTH_MODE") == "token" and token and not os.path.isfile(token):
        advice = "RAY_AUTH_TOKEN_PATH must name a file with the cluster's token."
        return Check(name="environment", state="problem", message=message, advice=advice, facts=facts)
    advice = " ".join(note for name, note in NOTES.items() if variables.get(name, "").lower() not in ("", "0", "false"))
    state: State = "note" if advice else "ok"
    return Check(name="environment", state=state, message=message, advice=advice or None, facts=facts)
