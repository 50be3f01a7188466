"""What the site has beyond the pages in this folder; mkdocs calls the functions named on_*."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ABLATIONS = ("characters", "grocery", "objects")

PAGES = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "examples/quickstart.md": "notebook.md",
    "experiments/README.md": "experiments.md",
    "experiments/ablations/README.md": "experiments/ablations.md",
    "experiments/benchmarks/README.md": "experiments/benchmarks.md",
    "experiments/configs/README.md": "experiments/configs.md",
    **{f"experiments/ablations/{name}/report.md": f"ablations/{name}.md" for name in ABLATIONS},
}
"""Pages of the site that lie elsewhere in the repository, where GitHub and readers of the code look for them."""

PICTURES = {f"experiments/ablations/{name}/differences.png": f"ablations/{name}.png" for name in ABLATIONS}

NO_LINKS = re.compile(r"(<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>)", re.S)
"""What a page's HTML has that gets no further links."""

SETTING = re.compile(r"<code>((?:[a-z_]+\.)(?:[\w.*]+))</code>")

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")

FENCED = re.compile(r"(^ *```.*?^ *```$)", re.S | re.M)

COMMENT_BEHIND = re.compile(r"^(?!#)( *)(.*\S) +(# .*)$", re.M)
WIDEST_CODE = 78  # characters, on a screen of 1280 pixels

FILES = "files"
"""The folder of the site that has the linked files which are no pages, by their path in the repository."""

BOOSTS = {"how-to/own-parts.md": 2.5, "how-to/": 1.3, "start.md": 1.3}
"""In the search, pages that say how to do something come before those that only mention it. The first start counts."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the settings and the pages from outside of docs/."""
    files.append(File.generated(config, "settings.md", content=_settings()))
    for source, page in PAGES.items():
        if (ROOT / source).exists():
            code = _scripts() if page == "examples.md" else ""
            files.append(File.generated(config, page, content=(ROOT / source).read_text() + code))
    for source, picture in PICTURES.items():
        files.append(File.generated(config, picture, content=(ROOT / source).read_bytes()))
    for source in [] if config.repo_url else _linked_files():
        site = f"{FILES}/{source}"  # also a script, which mkdocs.yml leaves out of docs/
        content = (ROOT / source).read_bytes()
        files.append(File.generated(config, site, content=content, inclusion=InclusionLevel.INCLUDED))
    return files


def _linked_files() -> list[str]:
    """The files of the repository that a page links and that are no pages, by their path."""
    found = set()
    for page in [*DOCS.rglob("*.md"), *filter(Path.exists, map(ROOT.joinpath, PAGES))]:
        for text in FENCED.split(page.read_text())[::2]:
            paths = [_source(link[3].partition("#")[0], page) for link in LINK.finditer(text)]
            found |= {path for path in paths if path and _site_path(path) is None and (ROOT / path).is_file()}
    return sorted(found)


def _scripts() -> str:
    """The examples themselves, for readers who have no clone."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    return "".join(f"\n## {script.name}\n\n```python\n{script.read_text()}```\n" for script in scripts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository become links of the site. Outside of fenced blocks only."""
    uri = page.file.src_uri
    sources = {site: source for source, site in PAGES.items()}
    here = ROOT / sources[uri] if uri in sources else DOCS / uri
    for start, boost in BOOSTS.items():
        if uri.startswith(start):
            page.meta.setdefault("search", {"boost": boost})
    return "".join(
        _comments_above(part) if number % 2 else LINK.sub(lambda link: _moved(link, here, uri, config), part)
        for number, part in enumerate(FENCED.split(markdown))
    )


def _comments_above(block: str) -> str:
    """A fenced block of commands whose comments stand above them, if they would be beyond its right edge."""
    is_wide = any(len(line) > WIDEST_CODE and COMMENT_BEHIND.match(line) for line in block.splitlines())
    if not is_wide or not block.lstrip().startswith("```bash") or "\\\n" in block:
        return block
    return COMMENT_BEHIND.sub(r"\1\3\n\1\2", block)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Settings that a page names in code become links to their reference."""
    if page.file.src_uri == "settings.md":
        _shorten(page.toc)
    parts = NO_LINKS.split(html)
    return "".join(
        part if number % 2 else SETTING.sub(lambda code: _linked(code, page.url), part)
        for number, part in enumerate(parts)
    )


def _linked(code: re.Match[str], url: str) -> str:
    key = re.sub(r"\.(\*|N|\d+)(?=\.|$)", "", code[1]).replace("cohort.base", "cohort.peers")
    if f"{{ #{key} }}" not in _settings():
        key += "-section"
    if f"{{ #{key} }}" not in _settings():
        return code[0]
    return f'<a class="to-setting" href="{get_relative_url("settings/", url)}#{key}">{code[0]}</a>'


@cache
def _settings() -> str:
    sys.path.insert(0, str(DOCS))
    from settings_reference import settings_page

    return settings_page()


def _shorten(toc: Any) -> None:
    """In the table of contents, a setting stands without the name of its section above it."""
    for title in toc:
        for section in title.children:
            for setting in section.children:
                setting.title = setting.title.removeprefix(f"{section.title}.")


def _moved(link: re.Match[str], here: Path, uri: str, config: Any) -> str:
    """A link of a page, for the site. A file that is no page is in the repository if that is known, else a copy is on
    the site. A folder is then named and not linked."""
    mark, text, target = link.groups()
    name, hash_sign, anchor = target.partition("#")
    source = _source(name, here)
    if source is None:
        return link[0]
    site = _site_path(source)
    if site is None and config.repo_url:
        return f"{mark}[{text}]({config.repo_url.rstrip('/')}/blob/main/{source})"
    if site is None and not (ROOT / source).is_file():
        return text
    return f"{mark}[{text}]({os.path.relpath(site or f'{FILES}/{source}', Path(uri).parent)}{hash_sign}{anchor})"


def _source(name: str, page: Path) -> str | None:
    """The path in the repository that a link of a page names. None: it names none."""
    path = Path(os.path.normpath(page.parent / name))
    if not name or "://" in name or name.startswith("mailto:") or not path.is_relative_to(ROOT):
        return None
    return path.relative_to(ROOT).as_posix()


def _site_path(source: str) -> str | None:
    """Where the site has a page or picture of the repository."""
    inside = source.removeprefix("docs/") if source.startswith("docs/") else None
    return {**PAGES, **PICTURES}.get(source, inside)
