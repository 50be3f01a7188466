"""A cluster that needs a token accepts the right one and refuses a wrong or missing one at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


TOKEN, OTHER = "a" * 64, "b" * 64
JOIN = """
from ray_dmml.ray_backend.session import ray_session
from ray_dmml.errors import UserError
try:
    with ray_session():
        print("joined")
except UserError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head that accepts only TOKEN."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--num-cpus", "1", "--include-dashboard=false"],
        # Its folder is not below that of the tests, because names of sockets must be short.
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def join(address: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    result = subprocess.run(
        [sys.executable, "-c", JOIN],
        env={**clean, "RAY_ADDRESS": address, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout


def test_the_right_token(cluster: str) -> None:
    assert join(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) == "joined\n"


def test_a_wrong_token(cluster: str) -> None:
    output = join(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=OTHER)
    assert output.startswith(f"refused: RAY_ADDRESS {cluster} does not accept this token")


def test_no_token(cluster: str) -> None:
    output = join(cluster, RAY_AUTH_MODE="disabled")
    assert output.startswith(f"refused: RAY_ADDRESS {cluster} does not accept this token")


def test_a_missing_token_file(cluster: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "token")
    output = join(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=missing)
    assert output == f"refused: RAY_AUTH_TOKEN_PATH {missing} is not a file: it must contain the cluster's token\n"
