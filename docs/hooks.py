"""What the site has beyond the pages in this folder; mkdocs calls the functions named on_*."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
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
    "experiments/configs/README.md": "experiments/configs.md",
    **{f"experiments/ablations/{name}/report.md": f"ablations/{name}.md" for name in ABLATIONS},
}
"""Pages of the site that lie elsewhere in the repository, where GitHub and readers of the code look for them."""

PICTURES = {f"experiments/ablations/{name}/differences.png": f"ablations/{name}.png" for name in ABLATIONS}

NO_LINKS = re.compile(r"(<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>)", re.S)
"""What a page's HTML has that gets no further links."""

SETTING = re.compile(r"<code>((?:[a-z_]+\.)(?:[\w.*]+))</code>")

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the settings and the pages from outside of docs/."""
    files.append(File.generated(config, "settings.md", content=_settings()))
    for source, page in PAGES.items():
        if (ROOT / source).exists():
            code = _scripts() if page == "examples.md" else ""
            files.append(File.generated(config, page, content=(ROOT / source).read_text() + code))
    for source, picture in PICTURES.items():
        files.append(File.generated(config, picture, content=(ROOT / source).read_bytes()))
    return files


def _scripts() -> str:
    """The examples themselves, for readers who have no clone."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    return "".join(f"\n## {script.name}\n\n```python\n{script.read_text()}```\n" for script in scripts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository become links of the site. Outside of fenced blocks only."""
    uri = page.file.src_uri
    sources = {site: source for source, site in PAGES.items()}
    here = ROOT / sources[uri] if uri in sources else DOCS / uri
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.S | re.M)
    return "".join(
        part if part.lstrip().startswith("```") else LINK.sub(lambda link: _moved(link, here, uri, config), part)
        for part in parts
    )


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
    """A link of a page, for the site. A file that is no page is named and not linked if no repository is known."""
    mark, text, target = link.groups()
    name, hash_sign, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not name:
        return link[0]
    path = Path(os.path.normpath(here.parent / name))
    relative = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else name
    if (site := {**PAGES, **PICTURES}.get(relative)) is None:
        if path.is_relative_to(DOCS):
            site = path.relative_to(DOCS).as_posix()
        elif config.repo_url:
            return f"{mark}[{text}]({config.repo_url.rstrip('/')}/blob/main/{relative})"
        else:
            return text
    return f"{mark}[{text}]({os.path.relpath(site, Path(uri).parent)}{hash_sign}{anchor})"
