"""``ray-dmml embed``: what it prints, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner

from ray_dmml.cli.main import app


def test_the_last_line_counts_images_and_unreadable_ones(small_run: Path, image_folder: Path, tmp_path: Path) -> None:
    """With --json it is on standard error. The same command has nothing left to do; another peer is refused."""
    photos, out = tmp_path / "photos", str(tmp_path / "out")
    shutil.copytree(image_folder / "class00", photos)
    (photos / "text.png").write_text("no image")
    command = ["embed", str(small_run), str(photos), "--out", out, "--local"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    line = f"embeddings of 6 images, 1 of them unreadable (see the column error): {out}"
    assert ended.stdout.splitlines()[-1].startswith(line)
    again = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(again.stdout)["num_unreadable"] == 1 and line in again.stderr
    refused = CliRunner().invoke(app, [*command, "--peer", "peer1"])
    assert refused.exit_code == 2
    assert (
        refused.stderr
        == f"error: {out} has embeddings of another peer, ensemble and not peer1: give another folder (out)\n"
    )
