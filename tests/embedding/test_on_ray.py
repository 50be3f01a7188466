"""Embeddings by Ray Data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from embedding_samples import rows_of, write_photos
from PIL import Image

from ray_dmml import UserError, embed


def test_the_rows_are_those_of_one_process(
    ray_start_4_cpus: None, small_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the bit, also the unreadable one, with the same shards, and nothing is printed. A folder that is begun here is
    finished there, and a folder that no actor can read is an error."""
    write_photos(tmp_path / "photos")
    (tmp_path / "photos/a/text.png").write_text("no image")

    def stop(done: int, total: int, unreadable: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(small_run, tmp_path / "photos", tmp_path / "ray", local=True, batch_size=4, on_progress=stop)
    for out, options in [("local", {"local": True}), ("ray", {"concurrency": 2})]:
        result = embed(small_run, tmp_path / "photos", tmp_path / out, batch_size=4, **options)
        assert (result["num_images"], result["num_unreadable"]) == (22, 1)
    names = [sorted(file.name for file in (tmp_path / out).iterdir()) for out in ("local", "ray")]
    assert names[0] == names[1] and len(names[0]) == 6 + 2
    assert rows_of(tmp_path / "ray").equals(rows_of(tmp_path / "local"))
    with pytest.raises(UserError, match=r"photos cannot be read on .*: No such file"):
        photos = tmp_path / "photos"
        embed(small_run, photos, tmp_path / "gone", concurrency=1, on_progress=lambda *_: photos.rename(tmp_path / "x"))
    printed = capfd.readouterr()
    assert [line for line in printed.err.splitlines() if "core_worker" not in line] == [] and printed.out == ""


SIZE = 3000


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """3,000 tiny images, 3 of them damaged."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "many"
    for number in range(SIZE):
        path = folder / f"{number % 10}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 1000:
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
        else:
            path.write_bytes(b"damaged")
    return folder


def workers_of(pid: int) -> list[int]:
    """The processes of Ray's actors that a command has started."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    below, found = {pid}, True
    while found:
        new = {int(row[0]) for row in rows if int(row[1]) in below} - below
        below, found = below | new, bool(new)
    return [int(row[0]) for row in rows if int(row[0]) in below and "MapWorker" in row[2]]


@pytest.mark.slow
@pytest.mark.ray
def test_kills_lose_no_row_and_give_none_twice(
    request: pytest.FixtureRequest, small_run: Path, many: Path, tmp_path: Path
) -> None:
    """kill -9 of an actor in mid-run goes unnoticed. After kill -9 of the command, the same one makes the rest."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ray_dmml.cli", "embed", str(small_run), str(many), "--out", str(out)]
    command += ["--batch-size", "32", "--concurrency", "2"]

    def done() -> int:
        return len(list(out.glob("part-*.parquet")))

    def wait_for(num_shards: int) -> None:
        deadline = time.monotonic() + 900
        while done() < num_shards:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)

    killed = []
    for round_number in range(3):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        request.addfinalizer(process.kill)
        if round_number == 2:
            assert process.wait(900) == 0, (tmp_path / "log").read_text()
            continue
        wait_for(done() + 10)
        before = done()
        worker = workers_of(process.pid)[0]
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)
        wait_for(before + 20)  # the other one goes on, and a new one comes
        process.kill()
        process.wait()
        assert before < done() < SIZE // 32
    assert len(set(killed)) == 2
    rows = rows_of(out)
    assert rows["path"].to_pylist() == sorted(str(path.relative_to(many)) for path in many.rglob("*.png"))
    errors = {path for path, error in zip(rows["path"].to_pylist(), rows["error"].to_pylist(), strict=True) if error}
    assert errors == {"0/00000.png", "0/01000.png", "0/02000.png"}
    embed(small_run, many, tmp_path / "local", local=True, batch_size=32)
    assert rows.equals(rows_of(tmp_path / "local"))
