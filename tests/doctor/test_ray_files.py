"""Ray's folder, sessions and cluster, of folders and ports that the test makes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ray_dmml.doctor import ray_files
from ray_dmml.doctor.check import GIB
from ray_dmml.doctor.environment import environment
from ray_dmml.doctor.ray_files import Sessions
from ray_dmml.ray_backend import session_folder as folders

OLD, NEW = "session_2026-01-01_10-00-00_000000_12", "session_2026-01-02_10-00-00_000000_345"


def test_sessions_that_run_are_told_by_their_sockets(tmp_path: Path) -> None:
    for name in (OLD, NEW):
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "logs/raylet.out").write_bytes(bytes(range(256)) * 400)
    (tmp_path / "session_latest").symlink_to(tmp_path / NEW)
    sockets = f"Num RefCount Path\n00: 02 /run/dbus\n00: 02 {tmp_path}/{NEW}/sockets/raylet\n00: 03\n"
    found = ray_files.read_sessions(tmp_path, sockets)
    assert (found.running, found.num_old, found.is_whole) == ([NEW], 1, True)
    assert 100_000 < found.old_bytes < 200_000
    check = ray_files.sessions(found)
    assert check.state == "note" and check.message.startswith("1 session runs here; 1 old session in ")
    assert ray_files.read_sessions(tmp_path / "none", sockets).num_old == 0


def test_old_sessions_are_a_note_if_they_are_large() -> None:
    assert ray_files.sessions(Sessions(Path("/tmp/ray"), [], 900, 2**20)).state == "ok"
    large = ray_files.sessions(Sessions(Path("/tmp/ray"), [], 900, 3 * GIB, is_whole=False))
    assert large.state == "note" and "over 3.0 GiB" in large.message
    assert large.advice is not None and "/tmp/ray/session_2*" in large.advice


def test_the_temporary_folder_is_the_one_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that RAY_TMPDIR names and that Ray cannot use is a problem; another one in place of TMPDIR is a note."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(folders, "SOCKET", "/s")  # so that the names of tests are short enough
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    check, folder = ray_files.temporary_folder({"TMPDIR": str(tmp_path)})
    assert folder == tmp_path / "ray"
    assert "sockets" not in check.message  # this machine's disk may be full, which is another note
    long = str(tmp_path / ("x" * 100))
    monkeypatch.setenv("TMPDIR", long)
    check, folder = ray_files.temporary_folder({"TMPDIR": long})
    assert check.state == "note" and f"{long} cannot be used for Ray's sockets" in check.message and folder
    monkeypatch.setenv("RAY_TMPDIR", long)
    check, folder = ray_files.temporary_folder({"RAY_TMPDIR": long})
    assert check.state == "problem" and "RAY_TMPDIR cannot be used" in check.message and folder is None


def test_a_cluster_that_does_not_answer_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ray_files.cluster(f"127.0.0.1:{port}").state == "ok"
        assert ray_files.cluster(f"ray://127.0.0.1:{port}").state == "ok"
    closed = ray_files.cluster(f"127.0.0.1:{port}")
    assert closed.state == "problem" and closed.advice == "Unset RAY_ADDRESS to run on this machine."
    assert ray_files.cluster("auto").state == "ok"


def test_variables_without_secrets(tmp_path: Path) -> None:
    """Variables that change a run are listed. A token file that is missing is a problem, because a run fails, too."""
    variables = {"PATH": "/bin", "RAY_AUTH_TOKEN": "abc", "OMP_NUM_THREADS": "4", "HF_TOKEN": "hf_x", "TMPDIR": "/t"}
    check = environment(variables)
    assert check.state == "ok"
    assert check.message == "HF_TOKEN=(secret), OMP_NUM_THREADS=4, RAY_AUTH_TOKEN=(secret), TMPDIR=/t"
    assert environment({"HF_HUB_OFFLINE": "1"}).state == "note" and environment({"HF_HUB_OFFLINE": "0"}).state == "ok"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert environment(token).state == "problem"
    (tmp_path / "token").touch()
    assert environment(token).state == "ok"
    assert environment({}).message == "nothing that changes a run"
