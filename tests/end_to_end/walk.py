"""What a user does with an installed ray-dmml, in a new folder: train, report, embed, index, search, serve, tune.

    python tests/end_to_end/walk.py venv/bin/ray-dmml

It takes about a minute on two cores, downloads nothing, and needs the extra `serve`.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
from PIL import Image

CONFIG = """
data: {name: imagefolder, root: photos, decode_size: 36, classes_per_batch: 4, images_per_class: 3,
       validation_fraction: 0.25}
cohort:
  threads_per_peer: 1
  base: {backbone: test_resnet, embedding_size: 16, input_size: 32, batch_norm: train}
  peers: [{}, {view: weak}]
train: {steps: 4, evaluate_every: 2}
"""

PAGE = ("page.css", "page.js")


def main(command: Path) -> None:
    command = command.absolute()
    with tempfile.TemporaryDirectory(prefix="ray-dmml-walk-") as name:
        folder = Path(name)
        _make_photos(folder / "photos")
        (folder / "photos.yaml").write_text(CONFIG)
        (folder / "space.yaml").write_text("space: {loss.relational.angle_weight: {uniform: [0, 4]}}\n")

        def run(*arguments: str) -> str:
            started = time.monotonic()
            ended = subprocess.run(
                [command, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, timeout=900, check=True
            )
            print(f"{time.monotonic() - started:5.1f} s  ray-dmml {' '.join(arguments)}", flush=True)
            return ended.stdout

        print(run("--version").strip())
        assert "ensemble" in run("train", "--config", "photos.yaml", "--out", "run")
        (folder / "run/report.html").unlink()
        run("report", "run")
        assert "<script>" in (folder / "run/report.html").read_text()
        run("embed", "run", "photos", "--local", "--out", "gallery")
        run("index", "gallery")
        query = "class03/1.png"
        found = json.loads(run("search", "gallery", f"photos/{query}", "--json"))
        assert found["queries"][0]["results"][0]["path"] == query, found
        _serve(command, folder, query)
        options = ["--num-samples", "2", "--sampler", "random", "--scheduler", "none", "--final-seeds", "1"]
        run("tune", "--config", "photos.yaml", "--space", "space.yaml", "--out", "search", *options)
        assert (folder / "search/report.html").exists() and (folder / "search/best.yaml").exists()


def _make_photos(root: Path) -> None:
    """16 classes of 5 small pictures."""
    rng = np.random.default_rng(0)
    for number in range(16):
        pattern = rng.integers(0, 256, (24, 24, 3))
        (root / f"class{number:02d}").mkdir(parents=True)
        for image in range(5):
            pixels = 0.7 * pattern + 0.3 * rng.integers(0, 256, (24, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{number:02d}" / f"{image}.png")


def _serve(command: Path, folder: Path, query: str) -> None:
    """Starts the service, gets its page, searches with a photo as the page does, and ends it by Ctrl-C."""
    started = time.monotonic()
    line = [command, "serve", "gallery", "--port", "0"]
    service = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert service.stdout is not None
        printed = ""
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", printed)):
            read = service.stdout.readline()
            assert read, f"the service has ended: {printed}"
            printed += read
        with urlopen(address[0], timeout=60) as answer:
            page = answer.read().decode()
        for name in PAGE:
            assert name in page
            with urlopen(f"{address[0]}/{name}", timeout=60) as answer:
                assert answer.read()
        connection = http.client.HTTPConnection(urlsplit(address[0]).netloc, timeout=60)
        boundary = "end-of-the-photo"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        body = head.encode() + (folder / "photos" / query).read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        connection.request("POST", "/search", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        reply = connection.getresponse()
        text = reply.read().decode()
        assert reply.status == 200 and query in text, (reply.status, text)
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(60)
    print(f"{time.monotonic() - started:5.1f} s  ray-dmml serve gallery --port 0", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
