"""What is published with a release: one version everywhere, links that lead somewhere, floors that are named."""

from __future__ import annotations

import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)|(?:src|srcset)=\"(?!https:)([^\"]+)\"")

needs_github = pytest.mark.skipif(not GITHUB.exists(), reason="no clone: .github is not in the sdist")


@pytest.fixture
def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def test_one_version(project: dict[str, Any]) -> None:
    """The newest entry of the changelog is the version that is built and cited."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest is not None
    assert newest[1] == citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def test_every_library_has_a_lowest_version(project: dict[str, Any]) -> None:
    """So that `--resolution lowest-direct` installs what is meant."""
    extras = project["optional-dependencies"].values()
    lines = [line for listed in (project["dependencies"], *extras) for line in listed]
    open_ended = [line for line in lines if not line.startswith("ray-dmml[") and ">=" not in line]
    assert not open_ended


@needs_github
def test_the_readme_on_pypi(project: dict[str, Any], tmp_path: Path) -> None:
    """All its links are absolute and name files that exist; its code is unchanged."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    main = runpy.run_path(str(GITHUB / "repository_address.py"))["main"]
    main(tmp_path, "https://example.org/o/r", f"v{project['version']}")
    before, after = (ROOT / "README.md").read_text(), (tmp_path / "README.md").read_text()
    relative = {link or picture for link, picture in RELATIVE.findall(before)}
    assert "docs/method.md" in relative and not RELATIVE.findall(after)
    for name in relative:
        assert (ROOT / name).exists(), name
    assert re.findall(r"```.*?```", after, re.S) == re.findall(r"```.*?```", before, re.S)
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == "https://example.org/o/r"
    with pytest.raises(SystemExit, match="the tag is v9"):
        main(tmp_path, "https://example.org/o/r", "v9")


@needs_github
def test_github_tests_every_python_that_is_promised(project: dict[str, Any]) -> None:
    workflow = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())
    classifiers = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == classifiers
    assert classifiers[0] == project["requires-python"].removeprefix(">=")


@needs_github
@pytest.mark.parametrize("form", ["bug", "feature", "question"])
def test_links_of_the_forms(form: str) -> None:
    """They lead to files of the repository, seen from its page of new issues."""
    text = (GITHUB / f"ISSUE_TEMPLATE/{form}.yml").read_text()
    for name in re.findall(r"\]\(\.\./(?:blob|tree)/main/([^)]+)\)", text):
        assert (ROOT / name).exists(), name
