"""Error messages of a config: what is wrong, where it is written, and the nearest allowed setting."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ray_dmml.config import habits
from ray_dmml.config.loading import is_set, shorten

MAX_LISTED = 20  # mistakes that a message lists; it counts the others

_TAGS = {"view": ("preset", "list"), "freeze_blocks": ("number", "name")}


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
        # pydantic adds the tags of a union to the location; the user never wrote them.
        parts = [str(part) for part in problem["loc"]]
        pairs = zip(["", *parts], parts, strict=False)
        location = [part for before, part in pairs if part not in _TAGS.get(before, ())]
        where = shorten(".".join(_as_written(location, raw or {}))) or "config"
        mistakes.setdefault((where, problem["type"], problem["msg"]), (location, problem))
    lines = []
    for (where, kind, message), (location, problem) in islice(mistakes.items(), MAX_LISTED):
        if kind == "extra_forbidden":
            message = f"unknown setting; {_hint(location, model)}"
        elif kind == "value_error":
            message = str(problem["ctx"]["error"])
        elif kind == "model_type" and location and problem["input"] is not None:
            message = _section_needed(where, problem["input"], _section_at(location, model))
        elif kind == "tuple_type":
            message = _list_needed(location, problem["input"])
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


def hint(name: str, model: type[BaseModel]) -> str:
    """What to write instead of a setting that does not exist; empty: nothing is near."""
    text = _hint([name], model)
    return "" if text.startswith("known here") else text


def refuse_change(section: type[BaseModel], name: str, value: Any, model: type[BaseModel]) -> str:
    """The message for an assignment to a field of a config, which never changes."""
    place = next((place for place, kind in _all_sections(model) if kind is section), "")
    key = f"{place}.{name}".lstrip(".").replace("cohort.peers", "cohort.peers.0")
    shown = shorten(repr(value), 60) if isinstance(value, (str, int, float, type(None))) else "..."
    return (
        f"{key} cannot be changed in place: make a changed copy of the whole config, "
        f"config.with_overrides({{{key!r}: {shown}}})"
    )


def _section_needed(where: str, value: Any, section: type[BaseModel] | None) -> str:
    """The message for a plain value in place of a section, such as `loss.metric: MultiSimilarityLoss`."""
    got, main = shorten(repr(value)), getattr(section, "main_setting", "")
    names = ", ".join(section.model_fields) if section else ""
    if isinstance(value, bool):
        return f"it has settings of its own ({names}), not a value (got {got}); {{}} means their defaults"
    if not main or isinstance(value, (list, tuple)):
        return f"it has settings of its own ({names}), not a value (got {got})"
    return f"it has settings of its own, not a value (got {got}); did you mean {where}.{main}={shorten(str(value))}?"


def _list_needed(location: list[str], value: Any) -> str:
    """The message for another value in place of a list."""
    if location == ["cohort", "peers"]:
        example = ", ".join(["{}"] * value) if type(value) is int and 0 < value < 10 else "{}, {}"
        if isinstance(value, dict) and value:
            example = ", ".join(f"{{name: {shorten(str(name), 20)}}}" for name in islice(value, 2))
        return f"a list with an entry for each peer is needed, such as [{example}]"
    if isinstance(value, Mapping):
        return "a list is needed, not a mapping"
    if value is None:
        return "a list is needed, not null"
    return f"a list is needed (got {shorten(repr(value))}), such as [{shorten(str(value))}]"


def _hint(location: list[str], model: type[BaseModel]) -> str:
    """What to write instead of an unknown setting: a similar name in its section, the same name in another section,
    or the setting that has this name in other tools."""
    section, wanted = _section_at(location[:-1], model), location[-1]
    if section is None:
        return "nothing is allowed here"
    names = [*section.model_fields, *getattr(section, "extra_keys", ())]
    of_class = names[1:2] == ["args"]  # the section names a class and its arguments
    if (sentence := habits.sentence_of(wanted)) and not of_class:
        return sentence
    if (found := habits.setting_of(wanted)) and not of_class:
        own = found.rpartition(".")[2]
        if own.endswith("steps") and own in names:  # those of a schedule, not those of training
            return f"did you mean {own!r}?"
        return _did_you_mean(found, location)
    # `margin` is no mistyped `args`, but one of them.
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.7 if of_class else 0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if of_class:
        return f"arguments of the class are in 'args': did you mean 'args.{shorten(wanted)}'?"
    # The shallowest comes first: `steps` means train.steps before a peer's schedule.steps.
    everywhere = sorted([*all_names(section), *all_names(model)], key=lambda n: n.count("."))
    found = next((name for name in everywhere if name.rsplit(".", 1)[-1] == wanted), None)
    return _did_you_mean(found, location) if found else f"known here: {', '.join(names)}"


def _did_you_mean(setting: str, location: list[str]) -> str:
    """Names a setting as it is written at a location: relative to the section if it is inside of it."""
    here = "".join(f"{part}." for part in location[:-1] if part != "base" and not part.isdigit())
    return f"did you mean {setting.removeprefix(here).replace('cohort.peers.', 'cohort.base.')!r}?"


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


def _all_sections(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections of a model, itself included, each with its dotted place."""
    yield place, model
    for name, field in model.model_fields.items():
        for inner in sections_in(field.annotation):
            yield from _all_sections(inner, f"{place}.{name}".lstrip("."))


def all_names(model: type[BaseModel]) -> list[str]:
    """The dotted names of all settings in a section."""
    return [f"{place}.{name}".lstrip(".") for place, section in _all_sections(model) for name in section.model_fields]


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The models inside of a field's annotation, such as PeerConfig in tuple[PeerConfig, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [section for part in parts for section in sections_in(part)]
