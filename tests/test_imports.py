"""What importing a module loads, seen from fresh processes."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import ray_dmml

pytestmark = pytest.mark.ray


RAY_ROOMS = ("ray_dmml.ray_backend", "ray_dmml.tune", "ray_dmml.embedding.on_ray", "ray_dmml.serve")

LOADS = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = [heavy for heavy in ("ray", "torch", "numpy") if heavy in sys.modules]
print(json.dumps(found))
"""


def loaded_by(*modules: str) -> dict[str, list[str]]:
    """Of ray, torch and numpy, what is loaded after each of these imports, in one fresh process."""
    ended = subprocess.run([sys.executable, "-c", LOADS, *modules], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(ended.stdout)
    return found


def test_no_module_below_the_ray_floor_loads_ray() -> None:
    """Every module of the package but those of the Ray side is imported; ray is not."""
    modules = (module.name for module in pkgutil.walk_packages(ray_dmml.__path__, "ray_dmml."))
    lower = sorted(name for name in modules if not name.startswith(RAY_ROOMS))
    lower.remove("ray_dmml.cli.__main__")  # it runs the command
    assert {"ray_dmml.training.trainer", "ray_dmml.inference", "ray_dmml.cli.main"} <= set(lower)
    found = loaded_by(*lower)
    assert [name for name in lower if "ray" in found[name]] == []


@pytest.mark.parametrize("module", ["ray_dmml.ray_backend.coordinator", "ray_dmml.cli.main"])
def test_light_modules_load_no_torch(module: str) -> None:
    """The coordinator's process and `ray-dmml --help` wait for neither torch nor ray."""
    assert set(loaded_by(module)[module]) <= ({"numpy"} if "coordinator" in module else set())


def test_the_package_hands_its_names_on_lazily() -> None:
    """`from ray_dmml import Config` loads nothing heavy; the other names are there all the same."""
    script = (
        "import sys; from ray_dmml import Config, UserError; "
        "assert not {'ray', 'torch', 'numpy'} & set(sys.modules), 'heavy'; Config()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in ray_dmml.__all__:
        assert name in dir(ray_dmml)
        assert getattr(ray_dmml, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = ray_dmml.trian
