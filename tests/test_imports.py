"""What importing a module loads, seen from fresh processes."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import ray_dmml
from ray_dmml.cli.main import app

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

HELP = """
import contextlib, io, json, sys
from ray_dmml.cli.main import app

for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        app([*command, "--help"])
    assert "Usage" in shown.getvalue(), command
print(json.dumps(sorted(sys.modules)))
"""

HEAVY = {
    *("torch", "torchvision", "ray", "numpy", "scipy", "sklearn", "pandas", "faiss", "pyarrow", "timm", "PIL"),
    *("huggingface_hub", "pytorch_metric_learning", "safetensors", "matplotlib", "jinja2", "tensorboardX", "yaml"),
    *("filelock", "threadpoolctl", "optuna", "onnx", "onnxruntime", "peft", "fastapi", "wandb", "mlflow"),
}
"""Everything that the package needs, but what reads a command line: typer, and pydantic with its newer versions."""


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


def test_no_help_waits_for_what_a_command_computes_with() -> None:
    """`--help` of every command, and so the completion of a shell, loads no library but those of the command line, and
    does not build the models of the config."""
    commands = [[], *([command.name or command.callback.__name__] for command in app.registered_commands)]
    commands += [["data", "check"], ["data", "fetch"]]
    ended = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(ended.stdout))
    assert not HEAVY & loaded
    assert "ray_dmml.config.schema" not in loaded


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
