"""The wheel and the sdist: what is in them, and that the wheel alone runs every step outside of the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
NO_SOURCE = {".ci", ".github", ".dockerignore", ".gitignore", ".pre-commit-config.yaml"}
"""What git has and the sdist has not: files for those who work in the clone."""

BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2])
"""


def build(kind: str, source: Path, into: Path) -> Path:
    """A wheel or an sdist of a folder; without a new environment, which would download setuptools."""
    into.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", BUILD, kind, str(into)], cwd=source, stdout=subprocess.DEVNULL, check=True)
    (built,) = into.iterdir()
    return built


def names_in_git() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no clone: the files of the repository are not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes into the folder."""
    source = tmp_path_factory.mktemp("source")
    for name in names_in_git():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return build("sdist", source, source.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent / "unpacked", filter="data")
    (unpacked,) = (sdist.parent / "unpacked").iterdir()
    return build("wheel", unpacked, sdist.parent.parent / "wheel")


def test_their_files(sdist: Path, wheel: Path) -> None:
    """The sdist has all that the tests read. The wheel has the package with its data, the licence, and nothing else."""
    tracked = names_in_git()
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    added = {"PKG-INFO", "setup.cfg"}
    in_sdist = {name for name in in_sdist if not name.startswith("ray_dmml.egg-info/")} - added
    assert in_sdist == {name for name in tracked if name.split("/")[0] not in NO_SOURCE}
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
        unlike = [n for n in tracked if n.startswith("ray_dmml/") and opened.read(n) != (ROOT / n).read_bytes()]
    assert not unlike
    information = {name for name in in_wheel if ".dist-info/" in name}
    assert in_wheel - information == {name for name in tracked if name.startswith("ray_dmml/")}
    assert any(name.endswith("/licenses/LICENSE") for name in information)


@pytest.mark.slow
def test_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """With the libraries of this environment, but another folder for the package."""
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(place)]
    subprocess.run([*install, str(wheel)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(place)
    where = "import ray_dmml; print(ray_dmml.__file__)"
    ended = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert Path(ended.stdout.strip()).is_relative_to(place)
    walk = [sys.executable, str(Path(__file__).with_name("walk.py")), str(place / "bin/ray-dmml")]
    subprocess.run(walk, cwd=tmp_path, env=environment, check=True, timeout=600)
