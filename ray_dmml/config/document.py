"""Writes the effective config with the meaning of every setting, as YAML that can be loaded again."""

from __future__ import annotations

import textwrap

from pydantic import BaseModel

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config


def documented_yaml(config: Config) -> str:
    """The config as YAML, with each field's docstring as a comment above it."""
    return "\n".join(_lines(config, 0, set())).lstrip("\n") + "\n"


def _lines(section: BaseModel, depth: int, documented: set[str]) -> list[str]:
    """The lines of a section. Fields in ``documented`` have had their comment, which other peers do not repeat."""
    indent, plain, lines = "  " * depth, section.model_dump(mode="json"), list[str]()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if depth == 0:
            lines.append("")
        key = f"{type(section).__name__}.{name}"
        if key not in documented:
            documented.add(key)
            comment = textwrap.wrap(field.description or "", 76 - len(indent), break_on_hyphens=False)
            lines.extend(f"{indent}# {line}" for line in comment)
        if isinstance(value, BaseModel):
            lines.append(f"{indent}{name}:")
            lines.extend(_lines(value, depth + 1, documented))
        elif value and isinstance(value, tuple) and isinstance(value[0], BaseModel):
            lines.append(f"{indent}{name}:")
            for entry in value:
                entry_lines = _lines(entry, depth + 2, documented)
                # The dash takes the place of the first key's indentation.
                first = next(i for i, x in enumerate(entry_lines) if not x.lstrip().startswith("#"))
                entry_lines[first] = f"{indent}  - {entry_lines[first].lstrip(' ')}"
                lines.extend(entry_lines)
        else:
            text = yamlio.dump(plain[name], default_flow_style=True, width=10_000)
            lines.append(f"{indent}{name}: {text.rstrip(chr(10)).removesuffix('...').rstrip(chr(10))}")
    return lines
