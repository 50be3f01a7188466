"""Whatever is in a config, an override or a manifest: a value or a UserError, and nothing else.

``RAY_DMML_FUZZ_EXAMPLES`` is the number of examples of all tests together (2000 unless set).
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_dmml.config import yamlio
from ray_dmml.config.schema import QUICKSTART, Config
from ray_dmml.data.datasets import manifest
from ray_dmml.errors import UserError

NUM_TESTS = 4
fuzz = settings(
    max_examples=int(os.environ.get("RAY_DMML_FUZZ_EXAMPLES", "2000")) // NUM_TESTS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With one image, a.png."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "a.png").write_bytes(b"x")
        (Path(scratch) / "b.png").write_bytes(b"x")
        yield Path(scratch)


def load(folder: Path, content: bytes, overrides: tuple[str, ...] = ()) -> None:
    """A config that can be read can be written, too."""
    path = folder / "c.yaml"
    path.write_bytes(content)
    try:
        config = Config.load(path, overrides)
    except UserError as error:
        assert str(error)
        return
    text = config.to_yaml()
    assert Config.parse(yamlio.load(text)).to_yaml() == text  # .nan is not equal to itself


SCRAPS = [
    "seed", "data", "cohort", "train", "steps", "peers", "base", "name", "root", "view", "loss",
    ": ", ":", "\n", "\n  ", "\n- ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<: ", "!!int ",
    "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!!timestamp ", "!!null ", "!!float ", "!!bool ",
    "!x ", "? ", "| ", "> ", "'", '"', "#", "%YAML 1.1", "---", "...", "1e400", "0x", "1:60", ".nan",
    "2001-01-01", "2001-13-01", "yes", "~", "~x", "null", "\t", "\ufeff", "\\0", "\\ud800", "\x85",
]  # fmt: skip
YAML_LIKE = st.one_of(
    st.lists(st.one_of(st.sampled_from(SCRAPS), st.text(max_size=4)), max_size=30).map("".join),
    st.text(max_size=200),
)


@fuzz
@given(st.one_of(YAML_LIKE.map(lambda text: text.encode(errors="replace")), st.binary()))
def test_any_text_as_a_config(folder: Path, content: bytes) -> None:
    """YAML-like text and arbitrary bytes."""
    load(folder, content)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(),
        st.sampled_from([0, 1, -1, 2**70, 1e400, "", "none", "off", "cosine", "offline", "/"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a nested value."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = [path] if path else []
    for key, inner in items:
        found += places(inner, (*path, key)) if isinstance(inner, (dict, list)) else [(*path, key)]
    return found


WHOLE = yamlio.load(Config.load(None).to_yaml())
SHORT = yamlio.load(QUICKSTART.read_text())
PLACES = {"whole": (WHOLE, places(WHOLE)), "short": (SHORT, places(SHORT))}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The quickstart, as written or with all that it implies, with some settings replaced or gone."""
    base, everywhere = PLACES[draw(st.sampled_from(["whole", "short"]))]
    raw = copy.deepcopy(base)
    for place in draw(st.lists(st.sampled_from(everywhere), min_size=1, max_size=4)):
        node: Any = raw
        try:
            for key in place[:-1]:
                node = node[key]
            if draw(st.booleans()):
                node[place[-1]] = draw(VALUES)
            else:
                del node[place[-1]]
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    return yamlio.dump(raw).encode(errors="replace")


@fuzz
@given(mutated())
def test_any_change_of_the_quickstart(folder: Path, content: bytes) -> None:
    """Settings of another kind, out of range, or missing."""
    load(folder, content)


KEYS = ["/".join(map(str, place)).replace("/", ".") for place in PLACES["whole"][1]]


@fuzz
@given(
    st.lists(
        st.one_of(
            st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=20)), YAML_LIKE).map(
                "=".join
            ),
            st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"{pair[0]}={pair[1]!r}"),
            st.text(max_size=30),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_override(folder: Path, overrides: list[str]) -> None:
    """KEY=VALUE of known and unknown keys."""
    load(folder, b"", tuple(overrides))


CELLS = st.one_of(
    st.sampled_from(["path", "label", "split", "is_query", "a.png", "b.png", "../x", "/", "train"]),
    st.sampled_from(["validation", "", "0", "1", "True", '"', "'", "\0", "x" * 300, "\ufeff"]),
    st.text(max_size=6),
)
CSV_LIKE = st.lists(st.lists(CELLS, max_size=6).map(",".join), max_size=8)
HEADED = CSV_LIKE.map(lambda lines: ["path,label,split,is_query,is_gallery", *lines])
TABLES = st.tuples(st.one_of(CSV_LIKE, HEADED), st.sampled_from(["\n", "\r\n", "\r", "\n\n"])).map(
    lambda pair: pair[1].join(pair[0]).encode(errors="surrogatepass")
)


@fuzz
@given(st.one_of(TABLES, st.binary(max_size=300)))
def test_anything_as_a_manifest(folder: Path, content: bytes) -> None:
    """CSV-like text and arbitrary bytes."""
    (folder / "m.csv").write_bytes(content)
    try:
        manifest.load(folder / "m.csv", folder, 8, "stretch")
    except UserError as error:
        assert str(error)
