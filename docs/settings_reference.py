"""The page *Settings*: every setting with its values, default and meaning, from the docstrings of the config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ray_dmml import Config

INTRODUCTION = """# Settings

A config file states only what differs from these defaults. `ray-dmml config --config FILE` prints all settings with
their values, and `--set KEY=VALUE` changes one on the command line. `cohort.peers.*` is an entry of the list of peers.
A setting under `cohort.base` applies to every peer.
"""

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"boolean": "true or false", "string": "text", "object": "mapping", "array": "list", "number": "number"}
TYPES |= {"integer": "integer", "null": "null"}


def settings_page() -> str:
    """The page as Markdown, with a heading for each setting, so that the search finds it."""
    schema = Config.model_json_schema()
    sections, top = list(_sections(schema, schema, "")), []
    for key, setting in _settings(schema, schema, ""):
        top += _entry(key, setting, schema)
    lines = [INTRODUCTION, "## Top level", "", *top]
    for prefix, section in sections:
        lines += [f"## {prefix}", "", section.get("description", ""), ""]
        for key, setting in _settings(section, schema, f"{prefix}."):
            lines += _entry(key, setting, schema)
    return "\n".join(lines) + "\n"


def _entry(key: str, setting: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    values = values_of(setting, schema)
    if "default" in setting:
        values += f" · default `{json.dumps(setting['default'])}`"
    elif "default" not in setting and values not in ("mapping", "list"):
        values += " · required"
    return [f"### `{key}`", "", f"{values}", "{ .setting }", "", setting.get("description", ""), ""]


def _resolve(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The section that a reference names. Its own description is that of the section, not of the field."""
    return schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part


def _section_of(setting: dict[str, Any], schema: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The section that a setting consists of, perhaps in a list or beside null; the first part is `.*` for a list."""
    for choice in [setting, *setting.get("anyOf", [])]:
        if "properties" in (found := _resolve(choice, schema)):
            return "", found
        if choice.get("type") == "array" and "properties" in (found := _resolve(choice.get("items", {}), schema)):
            return ".*", found
    return None


def _sections(section: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, setting in section["properties"].items():
        if (found := _section_of(setting, schema)) is not None:
            key = f"{prefix}{name}{found[0]}"
            yield key, found[1]
            yield from _sections(found[1], schema, f"{key}.")


def _settings(section: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of a section that are no sections themselves, or that may be left out."""
    for name, setting in section["properties"].items():
        if "$ref" not in setting:
            yield f"{prefix}{name}", setting


def values_of(setting: dict[str, Any], schema: dict[str, Any]) -> str:
    """The values that a setting may have, in words."""
    if "properties" in (found := _resolve(setting, schema)):
        return "section" if "$ref" in setting else str(found.get("title", "section"))
    if choices := setting.get("anyOf", setting.get("oneOf")):
        return ", or ".join(values_of(choice, schema) for choice in choices)
    if "enum" in setting:
        return ", ".join(f"`{value}`" for value in setting["enum"])
    if "const" in setting:
        return f"`{setting['const']}`"
    words = TYPES.get(setting.get("type", ""), "any value")
    if setting.get("format") == "path":
        words = "path"
    if setting.get("type") == "array" and "items" in setting:
        words = f"list of {values_of(setting['items'], schema)}"
    bounds = " and ".join(f"{sign} {setting[name]:g}" for name, sign in BOUNDS.items() if name in setting)
    return f"{words} {bounds}".strip()
