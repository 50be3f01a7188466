"""Where Ray's sockets and logs are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_dmml.errors import UserError
from ray_dmml.ray_backend import session_folder as folders
from ray_dmml.ray_backend.session_folder import session_folder


def test_the_folder_of_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR where it can be used, another one where not. RAY_TMPDIR is refused if it cannot be used."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(folders, "SOCKET", "/s")  # so that the names of tests are short enough
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert session_folder() == f"{tmp_path}/ray"
    for bad in (str(tmp_path / ("x" * 100)), "/proc/no/folder"):
        monkeypatch.setenv("TMPDIR", bad)
        assert not session_folder().startswith(bad) and os.access(session_folder(), os.W_OK)
        monkeypatch.setenv("RAY_TMPDIR", bad)
        with pytest.raises(
            UserError, match=rf"RAY_TMPDIR cannot be used \({bad}/ray: .*\): set RAY_TMPDIR to a folder"
        ):
            session_folder()
        monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(folders, "MIN_FREE_BYTES", 2**70)
    with pytest.raises(UserError, match=r"there is no folder for Ray's sockets and logs .*the disk is full"):
        session_folder()
