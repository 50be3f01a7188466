"""Sends 10,000 searches to `ray-dmml serve` while its index changes and its replicas are killed.

    python experiments/reliability/serving.py --requests 10000 --reloads 20 --kills 5

It makes tiny images, a run of two tiny peers and an index, and starts the service with one replica. Clients search for
one image. The changes of the index remove it and bring it back, so answers show which index they come from. The exit
code is 1 if a request got no answer or another one than 200, or if no answer came from a changed index.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from many_images import make_images, make_run
from processes import below
from rich.console import Console

sys.path.append(str(Path(__file__).parents[2]))
from ray_dmml import build_index, embed, remove_rows

NUM_IMAGES, QUERY, PATIENCE_S = 300, "07/0000007.png", 300.0


class Clients:
    """Threads that send searches one after the other, until so many have been sent together."""

    def __init__(self, port: int, image: bytes, requests: int, number: int) -> None:
        self.port, self.image, self.requests = port, image, requests
        self.seconds: list[float] = []
        self.first: list[str] = []  # the most similar image of each answer
        self.errors: list[str] = []
        self._sent, self._lock = 0, threading.Lock()
        self.threads = [threading.Thread(target=self._search) for _ in range(number)]
        for thread in self.threads:
            thread.start()

    def _search(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        while True:
            with self._lock:
                if self._sent == self.requests:
                    return
                self._sent += 1
            began = time.perf_counter()
            try:
                connection.request("POST", "/search?k=3", self.image, {"Content-Type": "image/png"})
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                connection.close()
                continue
            self.seconds.append(time.perf_counter() - began)
            if answer.status != 200:
                self.errors.append(f"{answer.status} {body.decode(errors='replace')}")
                continue
            self.first.append(json.loads(body)["results"][0]["matches"][0]["path"])

    @property
    def done(self) -> float:
        """The share of the requests that are over."""
        return (len(self.first) + len(self.errors)) / self.requests


def start(index: Path) -> tuple[subprocess.Popen[str], int]:
    """The service and its port."""
    command = [sys.executable, "-m", "ray_dmml.cli", "serve", str(index), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"answered at http://127\.0\.0\.1:(\d+)/", line):
            return process, int(found[1])
    raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")


def main(
    requests: Annotated[int, typer.Option(min=100, help="Number of searches.")] = 10_000,
    clients: Annotated[int, typer.Option(min=1, help="Number of clients.")] = 32,
    reloads: Annotated[int, typer.Option(min=0, help="How often the index changes.")] = 20,
    kills: Annotated[int, typer.Option(min=0, help="How often the replica is killed.")] = 5,
) -> None:
    """Search while the index changes and replicas die."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        folder = Path(name)
        make_images(folder / "images", NUM_IMAGES)
        make_run(folder)
        index = folder / "index"
        embed(folder / "run", folder / "images", index, local=True)
        build_index(index)
        process, port = start(index)
        try:
            events = sorted(
                [(0.05 + 0.9 * n / reloads, "reload") for n in range(reloads)]
                + [(0.08 + 0.9 * n / kills, "kill") for n in range(kills)]
            )
            began, is_there = time.monotonic(), True
            crowd = Clients(port, (folder / "images" / QUERY).read_bytes(), requests, clients)
            for moment, what in events:
                while crowd.done < moment:
                    time.sleep(0.05)
                if what == "kill":
                    for pid in below(process.pid, b"ServeReplica:ray-dmml:Replica"):
                        os.kill(pid, signal.SIGKILL)
                elif is_there:
                    remove_rows(index, [QUERY])
                    is_there = False
                else:
                    build_index(index, overwrite=True)
                    is_there = True
            for thread in crowd.threads:
                thread.join()
            taken = time.monotonic() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    without = sum(path != QUERY for path in crowd.first)
    console.print(f"{requests} searches by {clients} clients in {taken:.0f} s; {reloads} changes, {kills} kills")
    middle, late, latest = np.quantile(crowd.seconds, (0.5, 0.99, 1))
    console.print(f"seconds of a search: median {middle:.3f}, 99 % {late:.3f}, longest {latest:.1f}")
    console.print(f"answers from an index with the image: {len(crowd.first) - without}, without it: {without}")
    console.print(f"lost: {len(crowd.errors)} {crowd.errors[:3]}")
    raise typer.Exit(1 if crowd.errors or len(crowd.first) != requests or (reloads and not without) else 0)


if __name__ == "__main__":
    typer.run(main)
