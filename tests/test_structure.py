"""The floors of the package: a room imports only from floors below its own, and Ray stands in few rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_dmml

PACKAGE = Path(ray_dmml.__file__).parent

FLOORS = (
    {"errors", "atomic_files", "config", "filesystem", "randomness", "cores", "interruption"},
    {"data", "models", "losses", "checkpoint"},
    {"evaluation", "loggers", "peer", "pushed"},
    {"cohort", "report"},
    {"ray_backend"},
    {"training"},
    {"inference", "tune"},
    {"doctor", "embedding", "exporting", "hub", "index"},
    {"serve"},
    {"cli"},
)
"""From the ground up."""


RAY_ROOMS = {"ray_backend", "tune", "embedding", "serve"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".").removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, is at the top level and runs at import) of each import in a file."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if name in MODULES]
            names = modules if len(modules) == len(inner) else [*modules, node.module]
        for name in names:
            if id(node) not in typing_only:
                yield name, id(node) in top


MODULES = {name_of(path) for path in FILES}


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(name_of(path)) for path in FILES}
    assert rooms == set.union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_lead_down(path: Path) -> None:
    """Late imports count, too; those for type checkers do not."""
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    own = room_of(name_of(path))
    for module, _ in imports(path):
        other = room_of(module)
        if module.startswith("ray_dmml") and other and other != own:
            is_sibling_on_the_ground = floor_of[own] == floor_of[other] == 0
            assert floor_of[other] < floor_of[own] or is_sibling_on_the_ground, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_ray_stands_in_few_rooms(path: Path) -> None:
    """In ray_backend, tune, embedding and serve, and in late imports of commands."""
    for module, is_at_top in imports(path):
        if module.split(".")[0] == "ray" and room_of(name_of(path)) not in RAY_ROOMS:
            assert room_of(name_of(path)) == "cli" and not is_at_top, name_of(path)


def test_no_circle() -> None:
    """No two modules import each other, whether directly or through others."""
    graph = {
        name_of(path): {module for module, at_top in imports(path) if module.startswith("ray_dmml") and at_top}
        for path in FILES
    }
    assert sum(map(len, graph.values())) > len(graph)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_files_are_short() -> None:
    """No file is longer than a reader's patience; the schema is the settings reference, too."""
    long = {
        name_of(path): len(path.read_text().splitlines()) for path in FILES if len(path.read_text().splitlines()) > 400
    }
    assert set(long) <= {"ray_dmml.config.schema"}, long
