"""What a report shows, as plain data. `build` makes it of runs, and `page` renders it.

Pictures stand here as the indices of their images; :attr:`Report.pictures` has those that could be made. Every text is
a plain string, whatever is in it: the page escapes them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A cell of a table, perhaps with a smaller text below it, such as an interval."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]
    is_main: bool = False
    """It stands out."""


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    """The headings of all columns, that of the names first."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Line:
    """A curve over the steps."""

    name: str
    style: int
    """Which of the styles of lines it has; -1 is the ensemble's."""

    points: tuple[tuple[float, float], ...]
    """(step, value)"""

    band: tuple[tuple[float, float, float], ...] = ()
    """(step, lowest value, highest value) of the steps that a point is the mean of."""


@dataclass(frozen=True)
class Mark:
    """A point of a chart that is named."""

    step: float
    value: float
    text: str


@dataclass(frozen=True)
class Chart:
    key: str
    """Its anchor on the page."""

    title: str
    note: str
    unit: str
    """``%`` or nothing."""

    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    from_zero: bool = False
    """Its axis begins at 0."""


@dataclass(frozen=True)
class Finding:
    """A sentence of the summary, and the section with its evidence."""

    text: str
    anchor: str


@dataclass(frozen=True)
class Described:
    """What was run."""

    name: str
    path: str
    facts: tuple[tuple[str, str], ...]
    """(what, value)"""

    peers: Table
    commands: tuple[tuple[str, str], ...]
    """(what it does, the command)"""

    config: str
    """The whole config, as YAML."""


@dataclass(frozen=True)
class Picture:
    """A small picture as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Tile:
    """An image on the page."""

    image: int
    class_name: str
    name: str
    is_right: bool | None = None
    """Whether it is of the query's class; None: it is a query itself."""

    similarity: float | None = None


@dataclass(frozen=True)
class Found:
    """What one system finds for a query."""

    system: str
    outcome: str
    is_found: bool
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Card:
    """A query, and what every system finds."""

    query: Tile
    num_relevant: int
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Group:
    """Queries of one kind."""

    key: str
    title: str
    note: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Confusion:
    """Two classes that are taken for each other."""

    classes: tuple[str, str]
    counts: tuple[int, int]
    """Queries of the one whose nearest image is of the other, in both directions."""

    num_queries: tuple[int, int]
    examples: tuple[tuple[Tile, Tile], ...]
    """(query, what was found)"""


@dataclass(frozen=True)
class ClassRow:
    """How well a class is found."""

    name: str
    num_queries: int
    recalls: tuple[float, ...]
    """Recall@1 of every system, as a fraction."""

    instead: str
    """What is found instead most often; empty: no other class."""

    examples: tuple[Tile, ...]


@dataclass(frozen=True)
class Suspect:
    """An image that is perhaps of another class than its label says."""

    query: Tile
    suggested: str
    evidence: str
    neighbors: tuple[Tile, ...]
    own: Tile | None
    """The most similar image of its own class."""

    is_clear: bool
    """The label is probably wrong. Otherwise it may be an image that is hard to tell."""


@dataclass(frozen=True)
class Classes:
    """Recall@1 by class, the worst first."""

    systems: tuple[str, ...]
    rows: tuple[ClassRow, ...]
    note: str


@dataclass(frozen=True)
class Dot:
    """A class that is named on the map."""

    name: str
    style: int
    path: str
    x: float
    y: float


@dataclass(frozen=True)
class Placed:
    """A picture on the map."""

    image: int
    class_name: str
    x: float
    y: float


@dataclass(frozen=True)
class Map:
    """The test embeddings in two dimensions."""

    note: str
    found: str
    """The dots of queries that the ensemble finds, as the path of an SVG; so are the next ones."""

    missed: str
    others: str
    """Images that are no queries."""

    classes: tuple[Dot, ...]
    placed: tuple[Placed, ...]
    data: Mapping[str, Any]
    """For the script: places, classes and names of all images, and where their pictures are in :attr:`sheets`."""

    sheets: tuple[str, ...]
    """Data URIs, each of many small pictures."""


@dataclass(frozen=True)
class Report:
    """A whole page. What there is nothing to show of is empty or None."""

    title: str
    made: str
    runs: tuple[Described, ...]
    findings: tuple[Finding, ...] = ()
    warnings: tuple[str, ...] = ()
    results: Table | None = None
    results_note: str = ""
    further_results: tuple[tuple[str, Table], ...] = ()
    """(title, table)"""

    verification: Table | None = None
    verification_note: str = ""
    differences: Table | None = None
    """Settings that differ between runs."""

    validation: tuple[Chart, ...] = ()
    validation_note: str = ""
    losses: tuple[Chart, ...] = ()
    losses_note: str = ""
    groups: tuple[Group, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    classes: Classes | None = None
    agreement: Table | None = None
    agreement_note: str = ""
    agreement_charts: tuple[Chart, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    suspects_note: str = ""
    map: Map | None = None
    seconds: tuple[tuple[str, Table], ...] = ()
    """(title, table)"""

    systems: tuple[str, ...] = ()
    """What is compared in the gallery."""

    pictures: Mapping[int, Picture] = field(default_factory=dict)
    pictures_note: str = ""
