"""The service on a private Ray: replicas that die, an index that changes, and a command that ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served_index import encoded, make_index, make_run

from ray_dmml import update_index

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")

PATIENCE_S = 240.0
NEW = "class07/2.png"


class Service:
    """The command in a session of its own, so that its processes are known."""

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray_dmml.cli", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
        self.output, self.port = "", 0
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if found := re.search(r"answered at http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(found[1])
                return
        raise AssertionError(f"it did not start: {self.output}")

    def request(self, method: str, address: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, address, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def found(self, image: bytes, **parameters: int) -> list[str]:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        status, body = self.request("POST", f"/search?{query}", image)
        assert status == 200, body
        return [match["path"] for match in json.loads(body)["results"][0]["matches"]]

    def replicas(self) -> list[int]:
        """The ids of the processes that embed."""
        return [
            pid
            for pid, line in self.processes()
            if "Replica" in line and "ServeReplica" in line and "Gateway" not in line
        ]

    def processes(self) -> list[tuple[int, str]]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid:
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if state != "Z":
                        found.append((int(entry.name), line))
            except (OSError, ProcessLookupError):
                continue
        return found

    def end(self) -> int:
        """Ends it as Ctrl-C does; its exit code. Nothing is left."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=PATIENCE_S)
        until = time.monotonic() + PATIENCE_S
        while left := self.processes():
            assert time.monotonic() < until, left
            time.sleep(0.2)
        return self.process.returncode


@contextmanager
def running(*arguments: str | Path, environment: dict[str, str] | None = None) -> Iterator[Service]:
    service = Service(*arguments, environment=environment)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            os.killpg(service.process.pid, signal.SIGKILL)
            service.process.communicate()


class Clients:
    """Threads that send the same search repeatedly and keep the answers."""

    def __init__(self, service: Service, image: bytes, number: int) -> None:
        self.service, self.image = service, image
        self.answers: list[tuple[int, list[str]]] = []
        self.errors: list[str] = []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._search) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _search(self) -> None:
        while not self._is_over.is_set():
            try:
                status, body = self.service.request("POST", "/search?k=3", self.image)
            except OSError as error:
                self.errors.append(repr(error))
                continue
            if status != 200:
                self.errors.append(f"{status} {body.decode()}")
                continue
            self.answers.append((status, [match["path"] for match in json.loads(body)["results"][0]["matches"]]))

    def wait_for(self, number: int) -> None:
        """Waits until so many more requests have been answered."""
        wanted, until = len(self.answers) + number, time.monotonic() + PATIENCE_S
        while len(self.answers) < wanted:
            assert time.monotonic() < until and not self.errors, self.errors[:3]
            time.sleep(0.1)

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.ray
def test_nothing_is_lost(image_folder: Path, tmp_path: Path) -> None:
    """Requests go on while the index changes and the only replica dies. Ctrl-C ends it, and leaves no process."""
    run = make_run(image_folder, tmp_path / "run")
    folder = make_index(run, image_folder, tmp_path / "index", "ensemble", leave_out=[NEW])
    image = (image_folder / NEW).read_bytes()
    with running(folder, environment={"RAY_DMML_TOKEN": ""}) as service:
        clients = Clients(service, image, 4)
        clients.wait_for(20)
        assert NEW not in clients.answers[-1][1]
        update_index(folder)
        until = time.monotonic() + PATIENCE_S
        while clients.answers[-1][1][0] != NEW:
            assert time.monotonic() < until and not clients.errors, clients.errors[:3]
            time.sleep(0.1)
        [replica] = service.replicas()
        os.kill(replica, signal.SIGKILL)
        clients.wait_for(20)
        clients.end()
        assert not clients.errors, clients.errors[:3]
        assert service.replicas() not in ([], [replica])
        assert clients.answers[-1][1][0] == NEW
        assert_attackers_are_answered(service)
        assert service.found(image, k=5)[0] == NEW
        assert service.request("GET", "/healthz")[0] == 200
        assert service.end() == 130


def assert_attackers_are_answered(service: Service) -> None:
    """What only a server can be asked: a declared 2 GiB, a body without end, and a name of another page."""
    huge: dict[str, Any] = {"Content-Length": str(2 * 2**30), "Content-Type": "image/png"}
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE_S)
    connection.putrequest("POST", "/search")
    for key, value in huge.items():
        connection.putheader(key, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert send_without_end(service.port) < 2**28  # what the sockets and the proxy hold until it hangs up
    assert service.request("POST", "/search", encoded("PNG"), Host="evil.example")[0] == 421
    assert service.request("POST", "/search", b"<svg/>")[0] == 415


def send_without_end(port: int) -> int:
    """How many bytes of a chunked body were sent before the server hung up or answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.putrequest("POST", "/search")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk, sent = bytes(2**20), 0
    assert connection.sock is not None
    connection.sock.settimeout(PATIENCE_S)
    try:
        while sent < 2**31:
            connection.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            sent += len(chunk)
    except OSError:
        pass
    return sent
