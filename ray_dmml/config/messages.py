"""Error messages of a config: what is wrong, where it is written, and the nearest allowed setting."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ray_dmml.config.loading import is_set, shorten

MAX_LISTED = 20  # mistakes that a message lists; it counts the others


def explain(error: ValidationError, source: str, model: type[BaseModel], raw: Mapping[str, Any] | None = None) -> str:
    """Describes each mistake in one line: its place, what was given, and what is allowed.

    Args:
        error: pydantic's error.
        source: the config's name in the message, such as its path.
        model: the model that the config does not fit.
        raw: the config as it was written. With it, a mistake in `cohort.base` is reported once and there, not for each
            peer that inherits it.
    """
    mistakes: dict[tuple[str, str, str], tuple[list[str], ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        # pydantic adds the tags of the union `view` to the location; the user never wrote them.
        parts = [str(part) for part in problem["loc"]]
        pairs = zip(["", *parts], parts, strict=False)
        location = [part for before, part in pairs if not (before == "view" and part in ("preset", "list"))]
        where = shorten(".".join(_as_written(location, raw or {}))) or "config"
        mistakes.setdefault((where, problem["type"], problem["msg"]), (location, problem))
    lines = []
    for (where, kind, message), (location, problem) in islice(mistakes.items(), MAX_LISTED):
        if kind == "extra_forbidden":
            message = f"unknown setting; {_hint(location, model)}"
        elif kind == "value_error":
            message = str(problem["ctx"]["error"])
        elif not isinstance(problem["input"], (dict, list, tuple)):
            message += f" (got {shorten(repr(problem['input']))})"
        lines.append(f"{where}: {message}")
    if len(mistakes) > MAX_LISTED:
        lines.append(f"... and {len(mistakes) - MAX_LISTED} more")
    return f"{source}: " + ("" if len(lines) == 1 else "\n  ") + "\n  ".join(lines)


def _as_written(location: list[str], raw: Mapping[str, Any]) -> list[str]:
    """The place where a mistake is written: `cohort.base` if the peer inherits the setting from it."""
    cohort = raw.get("cohort") if isinstance(raw, Mapping) else None
    if location[:2] != ["cohort", "peers"] or len(location) < 3 or not isinstance(cohort, Mapping):
        return location
    peers, base, path = cohort.get("peers"), cohort.get("base"), location[3:]
    peer = peers[int(location[2])] if isinstance(peers, (list, tuple)) else {}
    if path == ["init_seed"] and not is_set(peer, path) and not is_set(base, path):
        path = ["seed"]  # the default of init_seed
    is_own = peer not in (None, {}) and is_set(peer, path)
    if base and is_set(base, path) and not is_own:
        return ["cohort", "base", *path]
    return [*location[:3], *path]


def _hint(location: list[str], model: type[BaseModel]) -> str:
    """The settings nearest to an unknown one: a similar name in its section, or the same name in another."""
    section = _section_at(location[:-1], model)
    if section is None:
        return "nothing is allowed here"
    names = [*section.model_fields, *getattr(section, "extra_keys", ())]
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.6)
    if not near:
        # The shallowest comes first: `steps` means train.steps before a peer's schedule.steps.
        elsewhere = sorted([*_all_names(section), *_all_names(model)], key=lambda n: n.count("."))
        near = [name for name in elsewhere if name.rsplit(".", 1)[-1] == location[-1]][:1]
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"


def _section_at(location: list[str], model: type[BaseModel]) -> type[BaseModel] | None:
    parts = iter(location)
    for part in parts:
        if part == "base" or part.isdigit():
            continue
        field = model.model_fields.get(part)
        inner = sections_in(field.annotation) if field else []
        if field is None or not inner:
            return None
        model = inner[0]
        if get_origin(field.annotation) is dict:
            next(parts, None)  # the key, which may be any text
    return model


def _all_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings in a section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from _all_names(inner, f"{prefix}{name}.")


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The models inside of a field's annotation, such as PeerConfig in tuple[PeerConfig, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [section for part in parts for section in sections_in(part)]
