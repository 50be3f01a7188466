"""The documentation as a site: built whole and strictly, and its links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ray_dmml
from ray_dmml import Config

ROOT = Path(__file__).parents[2]

needs_extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the extra `docs` is not installed",
)

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}


class Page(HTMLParser):
    """What a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag in LOADS and LOADS[tag] in values and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.add(values[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("REPO_URL", "SITE_URL")},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file.read_text()) for file in site.rglob("*.html")}


@pytest.mark.ray  # mkdocs is a process
@needs_extra
def test_no_link_is_broken(site: Path, pages: dict[Path, Page]) -> None:
    """Every link to a page, an anchor or a file of the site leads somewhere, also those that the theme makes."""
    broken = []
    for file, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            # 404.html is shown in the place of any page, and names others from the root.
            start = site if parts.path.startswith("/") else file.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{file.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{file.relative_to(site)}: {link} (anchor)")
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert sorted(broken) == []


@pytest.mark.ray
@needs_extra
@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("how-to/cluster", "cluster.yaml"),
        ("how-to/cluster", "deploy/aws-policy.json"),
        ("how-to/data", "experiments/prepare_grocery.py"),
        ("how-to/monitoring", "deploy/grafana/ray-dmml.json"),
        ("experiments/configs", "experiments/configs/cub200.yaml"),
    ],
)
def test_files_that_a_wheel_lacks_are_on_the_site(site: Path, pages: dict[Path, Page], page: str, file: str) -> None:
    """A page that names a file of the repository links a copy of it, if the address of the repository is not known."""
    folder = site / page
    linked = {(folder / link).resolve() for link in pages[folder / "index.html"].links if not urlsplit(link).scheme}
    assert (site / "files" / file).resolve() in linked
    assert (site / "files" / file).read_bytes() == (ROOT / file).read_bytes()


@pytest.mark.ray
@needs_extra
def test_no_other_host_is_asked(pages: dict[Path, Page], site: Path) -> None:
    """Fonts, scripts and pictures are the site's own: it works without the internet."""
    loaded = {(file.name, url) for file, page in pages.items() for url in page.loaded}
    styles = [url for file in site.rglob("*.css") for url in re.findall(r"url\(([^)]+)\)", file.read_text())]
    assert loaded
    assert [url for url in loaded if urlsplit(url[1]).netloc] == []
    assert [url for url in styles if urlsplit(url.strip("\"'")).netloc] == []


@pytest.mark.ray
@needs_extra
def test_every_setting_is_on_the_page_of_settings(site: Path, pages: dict[Path, Page]) -> None:
    """Each has an anchor, to which other pages link."""
    anchors = pages[site / "settings/index.html"].anchors
    assert {"seed", "data.name", "cohort.peers.update_interval", "cohort.peers.optimizer.lr"} <= anchors
    assert "cohort.base" in anchors  # which a file may have, and a config does not
    assert {"cohort.peers.view.name", "loss.mutual.name"} <= anchors  # of sections in a list
    assert {f"{section}-section" for section in Config.model_fields if section not in ("seed", "code")} <= anchors
    assert "../../settings/#train.steps" in pages[site / "how-to/training/index.html"].links


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    names = re.findall(r"^::: ray_dmml\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(names) == sorted(ray_dmml.__all__)


@pytest.mark.ray
@needs_extra
def test_every_public_name_has_an_entry(site: Path, pages: dict[Path, Page]) -> None:
    """Under the name that it is imported by, with its sections, and with no markup that is shown as text."""
    anchors = pages[site / "api/index.html"].anchors
    assert {f"ray_dmml.{name}" for name in ray_dmml.__all__} <= anchors
    text = (site / "api/index.html").read_text()
    assert re.findall(r":(?:func|class|meth|data|mod|attr):", text) == []
    assert "Parameters:" in text and "Raises:" in text
