"""`ray-dmml serve`: mistakes are one sentence before Ray starts; the configuration for `serve deploy`."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")

from ray.serve.schema import ServeDeploySchema
from served_index import make_index, make_run
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.serve.deployment import build
from ray_dmml.serve.settings import LOOPBACK, ServeSettings, hashed


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and an index of it by a peer."""
    folder = tmp_path_factory.mktemp("command")
    make_index(make_run(image_folder, folder / "run"), image_folder, folder / "index", "peer0")
    return folder


def invoke(*arguments: str | Path, token: str = "") -> Any:
    environment = {"COLUMNS": "200", "RAY_DMML_TOKEN": token}
    return CliRunner(env=environment).invoke(app, ["serve", *map(str, arguments)])


def refused(message: str, *arguments: str | Path) -> None:
    """The command ends with one sentence on standard error and exit code 2."""
    ended = invoke(*arguments, "--port", "0") if "--port" not in arguments else invoke(*arguments)
    assert ended.exit_code == 2, ended.output
    lines = ended.stderr.splitlines()
    assert len(lines) == 1 and re.search(f"^error: .*{message}", lines[0]), ended.stderr


def test_mistakes(folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = folder / "index"
    refused("is not an index", tmp_path)
    refused("--replicas must be a number such as 2, or a range such as 1..4, not 4..1", index, "--replicas", "4..1")
    refused("--replicas must be", index, "--replicas", "0")
    refused("999 replicas need as many cores", index, "--replicas", "999")
    other = make_run(image_folder, tmp_path / "other", seed=1)
    refused(r"embedded by another model than peer0 of .*other; give the run", index, "--run", other)
    moved = shutil.move(shutil.copytree(folder, tmp_path / "copy") / "run", tmp_path / "moved")
    broken = tmp_path / "copy/index/index.json"
    broken.write_text(broken.read_text().replace(str(folder), str(tmp_path / "copy")))
    refused(r"copy/run, which has embedded the images, is not there; give its folder \(--run\)", broken.parent)
    refused("999 replicas", broken.parent, "--run", moved, "--replicas", "999")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused(rf"port {port} of 127\.0\.0\.1 cannot be used: Address already in use", index, "--port", port)
    refused("port 8000 of 203.0.113.9 cannot be used", index, "--host", "203.0.113.9", "--port", "8000", "--token", "a")
    for token in ("", "ten\n", " ten", "öpen"):
        refused("the token must be ASCII characters", index, "--host", "0.0.0.0", "--token", token)
    refused(r"--write-config needs a fixed port \(--port\)", index, "--write-config", tmp_path / "serve.yaml")
    written = tmp_path / "nowhere/serve.yaml"
    refused(r"serve\.yaml cannot be written: No such file", index, "--port", "8000", "--write-config", written)
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    refused(r"needs Ray Serve; install it with: pip install 'ray-dmml\[serve\]'", index)


def test_the_configuration(folder: Path, tmp_path: Path) -> None:
    """Ray Serve accepts it, and builds the application of it. It has no token, only its hash."""
    file = tmp_path / "serve.yaml"
    options = ["--host", "0.0.0.0", "--port", "8080", "--replicas", "2..4", "--max-concurrent", "64"]
    options += ["--max-upload-mb", "2.5", "--max-megapixels", "7", "--batch-size", "5", "--trust-code"]
    options += ["--run", str(folder / "run")]
    ended = invoke(folder / "index", *options, "--write-config", file, token="open sesame")
    assert ended.exit_code == 0, ended.output
    assert "open sesame" not in file.read_text()
    content = yaml.safe_load(file.read_text())
    deployed = ServeDeploySchema.model_validate(content)
    assert (content["http_options"]["host"], content["http_options"]["port"]) == ("0.0.0.0", 8080)
    assert content["proxy_location"] == "EveryNode" and content["http_options"]["request_timeout_s"] > 0
    [application] = deployed.applications
    assert application.import_path == "ray_dmml.serve.deployment:build"
    settings = ServeSettings.model_validate(application.args)
    assert settings == ServeSettings(
        indexes=[str(folder / "index")],
        min_replicas=2,
        max_replicas=4,
        max_concurrent=64,
        max_upload_bytes=2_500_000,
        max_pixels=7_000_000,
        batch_size=5,
        trust_code=True,
        run=str(folder / "run"),
        token_sha256=hashed("open sesame"),
    )
    build(settings)
    assert "warning" not in ended.stderr
    ended = invoke(folder / "index", "--write-config", file)
    assert ended.exit_code == 2 and "already exists" in ended.stderr
    ended = invoke(folder / "index", "--host", "0.0.0.0", "--write-config", tmp_path / "open.yaml")
    assert ended.exit_code == 0 and "warning: everybody who reaches 0.0.0.0 may search" in ended.stderr
    invoke(folder / "index", "--write-config", tmp_path / "local.yaml")
    local = yaml.safe_load((tmp_path / "local.yaml").read_text())["applications"][0]["args"]
    assert local == {"indexes": [str(folder / "index")], "allowed_hosts": list(LOOPBACK)}
