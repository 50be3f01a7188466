"""A private Ray starts with odd home and temporary folders, and its workers import nothing from the working folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_dmml.ray_backend import private_ray

SCRIPT = """
import json, os
import ray
from ray_dmml.ray_backend.session import ray_session

@ray.remote
def find(*names):
    import importlib.util
    return [name for name in names if importlib.util.find_spec(name)]

with ray_session():
    found = ray.get(find.remote("stray", "wanted", "beside"))
    folder = ray._private.worker._global_node.get_session_dir_path()
print(json.dumps({"found": found, "folder": folder, "has_token": "RAY_AUTH_TOKEN" in os.environ}))
"""


@pytest.mark.ray
def test_odd_folders(tmp_path: Path) -> None:
    """The home folder cannot be made, the temporary folder has a long name, and modules lie in the working folder, in
    PYTHONPATH and beside the script. Workers find what the process finds."""
    for folder, module in (("work", "stray"), ("path", "wanted"), ("script", "beside")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{module}.py").touch()
    script = tmp_path / "script" / "run.py"
    script.write_text(SCRIPT)
    long = tmp_path / ("long" * 30)
    long.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([str(tmp_path / "path"), str(Path(private_ray.__file__).parents[2])])
    environment |= {"PYTHONPATH": path, "HOME": "/proc/no/home", "TMPDIR": str(long)}
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["found"] == ["wanted", "beside"] and not answer["has_token"]
    assert not answer["folder"].startswith(str(long)) and len(answer["folder"] + "/sockets/plasma_store") <= 107
