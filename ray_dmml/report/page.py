"""Renders a report as one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ray_dmml.report import drawing, embedding_map
from ray_dmml.report.data import Report

GENERATOR = "ray-dmml report"
"""Stands at the beginning of every page: a report replaces no other file."""


def render(page: Report) -> str:
    """The page as text. Names of classes, files and peers are escaped wherever they stand."""
    css, js = (
        files(__package__).joinpath("templates", name).read_text("utf-8") for name in ("report.css", "report.js")
    )
    charts = [*page.validation, *page.losses, *page.agreement_charts]
    drawn = {chart.key: (drawing.draw(chart), number) for number, chart in enumerate(charts)}
    box = {
        **{"left": drawing.LEFT, "right": drawing.RIGHT, "top": drawing.TOP, "bottom": drawing.BOTTOM},
        **{"width": drawing.WIDTH, "height": drawing.HEIGHT},
    }
    data: dict[str, Any] = {
        "box": box,
        "charts": [drawn[chart.key][0].hover for chart in charts],
        "map": page.map.data if page.map else None,
    }
    environment = Environment(
        loader=PackageLoader("ray_dmml.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"breakable": _breakable, "words": _words}
    return environment.get_template("report.html").render(
        page=page,
        sections=list(_sections(page)),
        drawn=drawn,
        box=box,
        map_box={"width": embedding_map.WIDTH, "height": embedding_map.HEIGHT},
        data=data,
        generator=GENERATOR,
        policy=_policy(css, js),
        # Our own files, the only text on the page that is not escaped.
        css=Markup(css),
        js=Markup(js),
    )


def is_report(content: bytes) -> bool:
    """Whether a file that begins with these bytes is a report of ours."""
    return f'<meta name="generator" content="{GENERATOR}">'.encode() in content[:500]


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line after an underscore, a slash, a bracket or an equals sign, and before the
    capital of a WordInside: few names have spaces."""
    return Markup("<wbr>").join(re.split(r"(?<=[_/(=])(?![_/(=])|(?<=[a-z0-9])(?=[A-Z][a-z])", name))


def _words(text: str) -> Markup:
    """A text whose words stay whole: only one that is wider than its column is broken, where a name may be."""
    return Markup(" ").join(Markup('<span class="word">{}</span>').format(_breakable(word)) for word in text.split(" "))


def _policy(css: str, js: str) -> str:
    """Nothing is loaded, and nothing runs but our own script."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _sections(page: Report) -> Iterator[tuple[str, str]]:
    """Anchors and names of the sections that there are."""
    yield from (("results", "Results"),) if page.results else ()
    yield "run", "What was run"
    yield "validation", "Validation"
    yield from (("losses", "Losses"),) if page.losses else ()
    yield from (("classes", "Worst classes"),) if page.classes else ()
    yield from (("confusions", "Confused classes"),) if page.confusions else ()
    if page.groups:
        yield "gallery", "Queries"
        disagree = [group for group in page.groups if group.key != "worst"]
        who = "Peers" if len(page.runs) == 1 else "Runs"
        yield from (("disagree", f"{who} disagree"),) if disagree else ()
    yield from (("suspects", "Perhaps mislabelled"),) if page.suspects else ()
    yield from (("map", "Map"),) if page.map else ()
    yield from (("agreement", "Agreement"),) if page.agreement or page.agreement_charts else ()
    yield from (("seconds", "Time"),) if page.seconds else ()
