"""The effective config with every field's documentation, as YAML that can be loaded again."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config

_WIDTH = 78


def documented_yaml(config: Config) -> str:
    """``config`` with each field's docstring as a comment above it."""
    return "\n".join(_section(config, 0)).lstrip("\n") + "\n"


def _section(section: BaseModel, depth: int, seen: set[str] | None = None) -> list[str]:
    indent = "  " * depth
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if depth == 0:
            lines.append("")
        if seen is None or name not in seen:  # documented once, not once a peer
            comment = textwrap.wrap(field.description or "", _WIDTH - len(indent) - 2)
            lines.extend(f"{indent}# {line}" for line in comment)
        if isinstance(value, BaseModel):
            lines.append(f"{indent}{name}:")
            lines.extend(_section(value, depth + 1, seen))
        elif value and isinstance(value, tuple) and isinstance(value[0], BaseModel):
            lines.append(f"{indent}{name}:")
            documented: set[str] = set()
            for entry in value:
                entry_lines = _section(entry, depth + 2, documented)
                documented = set(_all_names(type(entry)))
                # The dash takes the place of the first key's indentation.
                first = next(i for i, x in enumerate(entry_lines) if not x.lstrip().startswith("#"))
                entry_lines[first] = f"{indent}  - {entry_lines[first].lstrip(' ')}"
                lines.extend(entry_lines)
        else:
            lines.append(f"{indent}{_plain(name, value)}")
    return lines


def _all_names(model: type[BaseModel]) -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                names.extend(_all_names(part))
    return names


def _plain(name: str, value: Any) -> str:
    text = yamlio.dump(_jsonable(value), default_flow_style=True, width=10_000)
    return f"{name}: {text.removesuffix(chr(10)).removesuffix('...').rstrip(chr(10))}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _jsonable(value.model_dump())
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
