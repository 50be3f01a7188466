"""The commit is read from the files of git, without a process."""

from __future__ import annotations

from pathlib import Path

from ray_dmml.training.provenance import commit, cpu
from ray_dmml.training.stopwatch import Stopwatch

ONE, OTHER = "1" * 40, "2" * 40


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    """On a branch, loose or packed; detached; in a worktree; none without git, or before the first commit."""
    assert commit(tmp_path) is None
    git = tmp_path / "a" / ".git"
    write(git / "HEAD", "ref: refs/heads/main\n")
    assert commit(tmp_path / "a") is None
    write(git / "packed-refs", f"# pack-refs with: peeled\n{OTHER} refs/heads/main2\n{ONE} refs/heads/main\n")
    assert commit(tmp_path / "a") == ONE
    write(git / "refs/heads/main", OTHER + "\n")
    assert commit(tmp_path / "a") == OTHER
    write(git / "worktrees/b/HEAD", "ref: refs/heads/main\n")
    write(git / "worktrees/b/commondir", "../..\n")
    write(tmp_path / "b" / ".git", f"gitdir: {git}/worktrees/b\n")
    assert commit(tmp_path / "b") == OTHER
    write(git / "HEAD", ONE + "\n")
    assert commit(tmp_path / "a") == ONE
    assert isinstance(cpu(), str)


def test_times_are_added_up() -> None:
    """Those of each phase; a peer's phase that took no time is left out."""
    watch = Stopwatch()
    for _ in range(2):
        watch.add("training", 1.5)
    with watch.measure("validation"):
        pass
    results = watch.results({"peer0": {"metric loss": 0.0, "images and view": 2.0}})
    assert results["run"]["training"] == 3.0 and list(results["run"]) == ["training", "validation"]
    assert results["peers"] == {"peer0": {"images and view": 2.0}}
