"""The results of a search as one HTML file, with its pictures in it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ray_dmml.data.decoding import decode
from ray_dmml.errors import UserError
from ray_dmml.index.match import Match
from ray_dmml.report.pictures import jpeg_uri

MAX_PICTURES = 2000
"""In one page, which then has about 20 MB."""
SIDE = 256
"""Of the longer side of a picture, in pixels."""

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1240px; margin: 0 auto; padding: 1rem;
  color: #1c2024; background: #fff }
h1 { font-size: 1.3rem; margin: .5rem 0 }
section { display: grid; grid-template-columns: 200px 1fr; gap: 1.25rem; padding: 1.25rem 0;
  border-top: 1px solid #d5d9de }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) }
figure { margin: 0 }
figure > :first-child { width: 100%; aspect-ratio: 1; object-fit: contain; background: #eef0f2; border-radius: 6px;
  display: block }
.query figure > :first-child { outline: 2px solid #2563a8; outline-offset: 2px }
figure > .missing { display: grid; place-items: center; color: #5c656f; font-size: .85rem }
figcaption { font-size: .8rem; margin-top: .4rem; overflow-wrap: anywhere }
b { font-variant-numeric: tabular-nums }
p { margin: .25rem 0; color: #5c656f }
@media (max-width: 640px) {
  section { grid-template-columns: 1fr }
  .query figure { display: grid; grid-template-columns: 110px 1fr; gap: .9rem; align-items: center }
  ol { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) }
}
@media (prefers-color-scheme: dark) {
  body { color: #e6e8ea; background: #16191c } section { border-color: #343a40 }
  figure > :first-child { background: #23282d } p, figure > .missing { color: #a2abb4 }
}
"""


@dataclass(frozen=True)
class Answer:
    """A query and what was found."""

    name: str
    """The query, for people."""
    picture: Path | None
    """The query's image file; None: it cannot be shown."""
    matches: Sequence[Match]


def search_page(answers: Sequence[Answer], root: str | None, num_rows: int) -> str:
    """The page as text. A picture whose file is not there any more is left out.

    Args:
        answers: the queries.
        root: where paths of matches are relative to.
        num_rows: the size of the index.

    Raises:
        UserError: the page would have too many pictures.
    """
    num_pictures = sum(1 + len(answer.matches) for answer in answers)
    if num_pictures > MAX_PICTURES:
        raise UserError(f"a page of {num_pictures:,} pictures is too large, the most are {MAX_PICTURES:,}; lower -k")
    known: dict[Path, str] = {}

    def figure(path: Path | None, name: str, caption: str) -> str:
        if path is not None and path not in known:
            known[path] = _picture(path)
        shown = known[path] if path is not None else ""
        name = html.escape(name)
        picture = f'<img src="{shown}" alt="{name}">' if shown else '<span class="missing">no picture</span>'
        return f"<figure>{picture}<figcaption>{caption}<span>{name}</span></figcaption></figure>"

    sections = []
    for answer in answers:
        items = [
            "<li>" + figure(file_of(root, m.path), m.path, f"<b>{m.rank} · {m.similarity:.3f}</b><br>") + "</li>"
            for m in answer.matches
        ]
        found = f"<ol>{''.join(items)}</ol>" if items else "<p>nothing is similar enough</p>"
        query = figure(answer.picture, answer.name, "<b>Query</b><br>")
        sections.append(f'<section><div class="query">{query}</div>{found}</section>')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Search</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>\n<body>'
        f"<h1>The most similar of {num_rows:,} images</h1>"
        "<p>Numbers are cosine similarities: 1 is the same embedding.</p>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def file_of(root: str | None, path: str) -> Path | None:
    """Where an image of the index is; None: not on this machine."""
    if "://" in path or (root is not None and "://" in root):
        return None
    return Path(path) if root is None else Path(root) / path


def _picture(path: Path) -> str:
    """A small JPEG as a data URI; empty if the file cannot be read."""
    try:
        image = Image.fromarray(decode(path).permute(1, 2, 0).numpy())
    except Exception:  # decoders raise nearly anything
        return ""
    image.thumbnail((SIDE, SIDE))
    return jpeg_uri(image, 82)
