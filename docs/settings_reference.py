"""The page *Settings*: every setting with its values, default and meaning, from the docstrings of the config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ray_dmml import Config
from ray_dmml.config.schema import CohortConfig

INTRODUCTION = """---
search:
  boost: 2
---

# Settings

A config file states only what differs from these defaults. `ray-dmml config --config FILE` prints all settings with
their values, and `--set KEY=VALUE` changes one on the command line. `cohort.peers.*` is an entry of the list of peers.
A setting under `cohort.base` applies to every peer. The search of this site finds a setting by its name, or by a part
of it.

| section | what it sets |
|---|---|
"""

BOUNDS = {"minimum": "≥", "ge": "≥", "exclusiveMinimum": ">", "gt": ">"}
BOUNDS |= {"maximum": "≤", "le": "≤", "exclusiveMaximum": "<", "lt": "<"}
TYPES = {"boolean": "true or false", "string": "text", "object": "mapping", "array": "list", "number": "number"}
TYPES |= {"integer": "integer", "null": "null"}


def settings_page() -> str:
    """The page as Markdown, with a heading for each setting, so that the search finds it."""
    schema = Config.model_json_schema()
    sections, top = list(_sections(schema, schema, "")), []
    for key, setting in _settings(schema, schema, ""):
        top += _entry(key, setting, schema)
    overview = [f"| [`{key}`](#{anchor(key)}-section) | {first_sentence(section)} |" for key, section in sections]
    lines = [INTRODUCTION + "\n".join(overview), "", "## Top level", "", *top]
    for prefix, section in sections:
        lines += [f"## `{prefix}` {{ #{anchor(prefix)}-section }}", "", section.get("description", ""), ""]
        if prefix == "cohort":
            for key, description in CohortConfig.extra_keys.items():
                lines += _entry(f"{prefix}.{key}", {"type": "object", "description": description}, schema)
        for key, setting in _settings(section, schema, f"{prefix}."):
            lines += _entry(key, setting, schema)
    return "\n".join(lines) + "\n"


def anchor(key: str) -> str:
    """The anchor of a setting or section on the page."""
    return key.replace(".*", "")


def first_sentence(section: dict[str, Any]) -> str:
    return str(section.get("description", "")).replace("\n", " ").partition(". ")[0].removesuffix(".") + "."


def _entry(key: str, setting: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    values = values_of(setting, schema, key)
    if "default" in setting:
        default = setting["default"]
        if not (isinstance(default, list) and default and isinstance(default[0], dict)):  # the peers: too long
            values += f" · default `{default if isinstance(default, str) else json.dumps(default)}`"
    elif values not in ("mapping", "list"):
        values += " · required"
    words = key.rpartition(".")[2].replace("_", " ")
    hidden = f"<span hidden>{words}</span>" if " " in words else ""  # so that the search knows the parts of a name
    return [
        f"### `{key}` {{ #{anchor(key)} }}",
        "",
        f"{values}{hidden}",
        "{ .setting }",
        "",
        setting.get("description", ""),
        "",
    ]


def _resolve(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The section that a reference names. Its own description is that of the section, not of the field."""
    return schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part


def _choices(setting: dict[str, Any]) -> list[dict[str, Any]]:
    return setting.get("anyOf", setting.get("oneOf", []))


def _section_of(setting: dict[str, Any], schema: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The section that a setting consists of, perhaps in a list or beside null; the first part is `.*` for a list."""
    for choice in [setting, *_choices(setting)]:
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


def values_of(setting: dict[str, Any], schema: dict[str, Any], key: str) -> str:
    """The values that the setting with this key may have, in words."""
    if "properties" in _resolve(setting, schema):
        return f"[section](#{anchor(key)}-section)"
    if choices := _choices(setting):
        return ", or ".join(values_of(choice, schema, key) for choice in choices)
    if "enum" in setting:
        return ", ".join(f"`{value}`" for value in setting["enum"])
    if "const" in setting:
        return f"`{setting['const']}`"
    words = TYPES.get(setting.get("type", ""), "any value")
    if setting.get("format") == "path":
        words = "path"
    if setting.get("type") == "array" and "items" in setting:
        words = f"list of {values_of(setting['items'], schema, key).replace('section]', 'sections]')}"
    bounds = " and ".join(
        f"{sign} {setting[name]:g}" for name, sign in BOUNDS.items() if setting.get(name, 1e30) < 1e30
    )
    return f"{words} {bounds}".strip()
