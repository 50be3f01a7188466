"""Any content of a config, an override or a manifest gives a result or a UserError, and nothing else.

Each test runs with a few examples, and, marked slow, with ``RAY_DMML_FUZZ_EXAMPLES`` (2000 unless set).
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_dmml.config import yamlio
from ray_dmml.config.loading import QUICKSTART, dotted
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data.datasets import manifest
from ray_dmml.data.findings import Findings
from ray_dmml.errors import UserError

FEW = 200
MANY = int(os.environ.get("RAY_DMML_FUZZ_EXAMPLES", "2000"))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with two files, a.png and b.png."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "a.png").write_bytes(b"x")
        (Path(scratch) / "b.png").write_bytes(b"x")
        yield Path(scratch)


Check = Callable[[Path, Any], bool]


def fuzz(examples: st.SearchStrategy[Any]) -> Callable[[Check], Callable[[Path, int], None]]:
    """Makes a test of a function that returns whether an example was accepted. Some examples must be
    accepted and some refused, so that the test sees both."""

    def test_of(check: Check) -> Callable[[Path, int], None]:
        @pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
        def test(folder: Path, number: int) -> None:
            outcomes = set()

            @settings(
                max_examples=number,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            @given(examples)
            def run(example: Any) -> None:
                outcomes.add(check(folder, example))

            run()
            assert outcomes == {True, False}

        test.__doc__ = check.__doc__
        return test

    return test_of


def loads(folder: Path, content: bytes, overrides: tuple[str, ...] = ()) -> bool:
    """Whether the config is accepted. A config that can be read can be written too."""
    path = folder / "c.yaml"
    path.write_bytes(content)
    try:
        config = Config.load(path, overrides)
    except UserError as error:
        assert str(error)
        return False
    text = config.to_yaml()
    assert Config.parse(yamlio.load(text)).to_yaml() == text  # compared as text: .nan != .nan
    return True


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


@fuzz(st.one_of(YAML_LIKE.map(lambda text: text.encode(errors="replace")), st.binary()))
def test_any_text_as_a_config(folder: Path, content: bytes) -> bool:
    """YAML-like text and arbitrary bytes."""
    return loads(folder, content)


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
    """The path of every value inside a nested one."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    paths = [path] if path else []
    for key, inner in items:
        paths += places(inner, (*path, key)) if isinstance(inner, (dict, list)) else [(*path, key)]
    return paths


EFFECTIVE = Config.quickstart()
WHOLE = yamlio.load(EFFECTIVE.to_yaml())
SHORT = yamlio.load(QUICKSTART.read_text())
PLACES = {"whole": (WHOLE, places(WHOLE)), "short": (SHORT, places(SHORT))}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The quickstart, as written or with all its defaults, after some settings are replaced or removed."""
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
        except (KeyError, IndexError, TypeError):  # an earlier change has removed it
            continue
    return yamlio.dump(raw).encode(errors="replace")


@fuzz(mutated())
def test_any_change_of_the_quickstart(folder: Path, content: bytes) -> bool:
    """Settings of another type, out of range, or missing."""
    return loads(folder, content)


KEYS = [".".join(map(str, place)) for place in PLACES["whole"][1]]
VALID = [f"{key}={yamlio.dump(value)}" for key, value in dotted(WHOLE).items()]


@fuzz(
    st.lists(
        st.one_of(
            st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=20)), YAML_LIKE).map("=".join),
            st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"{pair[0]}={pair[1]!r}"),
            st.text(max_size=30),
            st.sampled_from(VALID),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_override(folder: Path, overrides: list[str]) -> bool:
    """KEY=VALUE with known and unknown keys, for a file and for a config."""
    with suppress(UserError):
        changed = EFFECTIVE.with_overrides(overrides)
        assert Config.parse(yamlio.load(changed.to_yaml())) == changed
    return loads(folder, b"", tuple(overrides))


CELLS = st.one_of(
    st.sampled_from(["path", "label", "split", "is_query", "a.png", "b.png", "../x", "/", "train"]),
    st.sampled_from(["validation", "", "0", "1", "True", '"', "'", "\0", "x" * 300, "\ufeff"]),
    st.text(max_size=6),
)
CSV_LIKE = st.lists(st.lists(CELLS, max_size=6).map(",".join), max_size=8)
COLUMNS = "path,label,split,is_query,is_gallery"
HEADED = CSV_LIKE.map(lambda lines: [COLUMNS, *lines])
ROWS = st.tuples(*(st.lists(st.sampled_from(["", "0", "1", " TRUE", "x"]) | CELLS, max_size=2),) * 2).map(
    lambda flags: [
        COLUMNS,
        ",".join(["a.png", "x", "train", *flags[0]]),
        ",".join(["b.png", "y", "validation", *flags[1]]),
    ]
)
TABLES = st.tuples(st.one_of(CSV_LIKE, HEADED, ROWS), st.sampled_from(["\n", "\r\n", "\r", "\n\n"])).map(
    lambda pair: pair[1].join(pair[0]).encode(errors="surrogatepass")
)


@fuzz(st.one_of(TABLES, st.binary(max_size=300)))
def test_anything_as_a_manifest(folder: Path, content: bytes) -> bool:
    """CSV-like text and arbitrary bytes."""
    (folder / "m.csv").write_bytes(content)
    try:
        config = DataConfig(name="manifest", manifest=folder / "m.csv", root=folder, decode_size=8)
        manifest.load(config, folder, Findings())
    except UserError as error:
        assert str(error)
        return False
    return True
