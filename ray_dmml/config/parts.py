"""Own parts: classes and functions from outside this package, which a config names.

A name is ``module:Class``, or that of an entry point of an installed package in the group ``ray_dmml.parts``. A class
is built with the part's ``args``. A function is the part itself, and gets ``args`` at each call.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_dmml.config.code import Files, read_code, use_code
from ray_dmml.config.loading import shorten
from ray_dmml.errors import UserError

if TYPE_CHECKING:
    from ray_dmml.config.schema import Config

ENTRY_POINTS = "ray_dmml.parts"
"""The group of entry points whose names a config may use."""

SERVICES = {
    "wandb": "ray_dmml.loggers.wandb:WandbLogger",
    "mlflow": "ray_dmml.loggers.mlflow:MlflowLogger",
    "trackio": "ray_dmml.loggers.trackio:TrackioLogger",
}
"""Loggers of this package that `train.loggers` may name. They need the extra of the same name."""

_PACKAGE, _PYTHON = str(Path(__file__).parents[1]) + os.sep, str(Path(os.__file__).parent) + os.sep

_PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")

PART_SETTINGS = re.compile(
    r"data\.name|loss\.metric\.(?:.*\.)?name|loss\.metric\.(?:.*\.)?reducer|loss\.mutual\.\d+\.name|train\.loggers\.\d+\.name"
    r"|cohort\.peers\.\d+\.(?:backbone|view|view\.\d+\.name)",
    re.DOTALL,  # a key may contain a line break
)
"""The settings that may name a part."""

_ONLY_OWN = re.compile(r"loss\.mutual\.\d+\.name|train\.loggers\.\d+\.name")
"""Those of them whose parts are all own ones."""


def is_path(name: str) -> bool:
    """Whether a name is written as ``module:Class``."""
    return _PATH.fullmatch(name) is not None


def is_own(name: str) -> bool:
    """Whether a name is that of an own part. Names of this package and its libraries have no colon, and come before
    entry points."""
    return is_path(name) or name in _entry_points(tuple(sys.path))


@cache
def _entry_points(path: tuple[str, ...]) -> dict[str, str]:
    """The names of installed packages and what they stand for. To read them takes a while, so this is done once."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=ENTRY_POINTS)}


def own_names(config: Config) -> list[tuple[str, str]]:
    """The settings that name an own part as ``module:Class``, with the name. Entry points are left out."""
    return [(setting, name) for setting, name, _ in _parts_of(config.model_dump(mode="json")) if is_path(name)]


def _parts_of(section: Any, prefix: str = "") -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each setting that may name a part, the name, and the part's arguments."""
    for key, value in section.items() if isinstance(section, Mapping) else enumerate(section):
        setting = f"{prefix}{key}"
        if isinstance(value, str) and PART_SETTINGS.fullmatch(setting):
            args = section.get({"name": "args", "backbone": "backbone_args"}.get(str(key), ""))
            yield setting, value, args if isinstance(args, Mapping) else {}
        elif isinstance(value, (Mapping, list)):
            yield from _parts_of(value, f"{setting}.")


def load_parts(config: Config) -> Files:
    """Makes the files of `code` importable, and imports every own part that the config names.

    Returns:
        The files, for other processes of the run.

    Raises:
        UserError: a file cannot be read, or a part cannot be found.
    """
    files = read_code(config.code)
    use_code(files)
    require_parts(config)
    return files


def require_parts(config: Config, *, loggers: bool = True) -> None:
    """Raises UserError if an own part of the config cannot be found in this process, which may need no ``loggers``, or
    has no parameter of a name in its ``args``."""
    for setting, name, args in _parts_of(config.model_dump(mode="json")):
        is_needed = loggers or not setting.startswith("train.loggers.")
        if is_needed and (is_path(name) or _ONLY_OWN.fullmatch(setting)):
            check_arguments(setting, name, find_part(setting, name), args, is_complete=False)


def load_trusted_parts(config: Config, run: Path, trust_code: bool, how: str, settings: str = "") -> None:
    """The same for the config of a run, which may be somebody else's. Without trust, nothing of `code` is importable.

    Args:
        how: what allows the code of the run.
        settings: only parts of the settings that contain this are needed.

    Raises:
        UserError: the run has own parts that are needed, and nobody has said that it may be trusted.
    """
    names = [(setting, name) for setting, name in own_names(config) if settings in setting]
    if trust_code:
        use_code(read_code(config.code))
        for setting, name in names:
            find_part(setting, name)
    elif names:
        listed = ", ".join(dict.fromkeys(f"{name} ({setting})" for setting, name in names))
        raise UserError(
            f"{run} runs code that is not of this package: {listed}; allow it with {how}, if you trust who wrote its "
            "config"
        )


def find_part(setting: str, name: str) -> Callable[..., Any]:
    """The class or function of this name.

    Args:
        setting: the setting that names it, for errors.

    Raises:
        UserError: it cannot be imported (the message says where it was looked for), or is no class and no function.
    """
    source, path = f"{setting} {name!r}", name
    services = SERVICES if setting.startswith("train.loggers.") else {}
    if name in services:
        path = services[name]
    elif not is_path(name):
        known = _entry_points(tuple(sys.path))
        if name not in known:
            listed = f" ({', '.join(sorted(known))})" if known else ", and there are none"
            or_these = f"name one of {', '.join(services)}, " if services else ""
            raise UserError(
                f"{source}: {or_these}write your own part as module:name, or give the name of an entry point in the "
                f"group {ENTRY_POINTS} of an installed package{listed}"
            )
        path = known[name]
        source = f"{source} (entry point of {path})"
    module_name, _, attributes = path.partition(":")
    try:
        part: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed_import(source, module_name, error) from error
        raise UserError(f"{source}: there is no module {error.name}; {_where_looked()}") from None
    except (Exception, SystemExit) as error:
        raise _failed_import(source, module_name, error) from error
    file = getattr(part, "__file__", None) or "built in"
    for attribute in attributes.split("."):
        if not hasattr(part, attribute):
            near = difflib.get_close_matches(attribute, vars(part), n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"{source}: module {module_name} ({file}) has no {attribute}{hint}")
        part = getattr(part, attribute)
    if not (inspect.isclass(part) or inspect.isroutine(part)):
        raise UserError(f"{source}: a class or a function is needed, and it is of type {type(part).__name__}")
    return part


def make_part(setting: str, name: str, args: Mapping[str, Any]) -> Any:
    """An instance of a class, or a function with its arguments.

    Raises:
        UserError: it cannot be found, or refuses its arguments.
    """
    part = find_part(setting, name)
    if inspect.isclass(part):
        return call_part(setting, name, part, args)
    check_arguments(setting, name, part, args, is_complete=False)
    return partial(part, **args) if args else part


def call_part(setting: str, name: str, part: Callable[..., Any], args: Mapping[str, Any], *given: Any) -> Any:
    """Calls a class or function. Raises UserError if it refuses its arguments, or fails."""
    check_arguments(setting, name, part, args, *given)
    try:
        return part(*given, **args)
    except UserError:
        raise
    except Exception as error:
        shown = f" with {shorten(repr(dict(args)))}" if args else ""
        raise UserError(f"{setting}: {name}{shown} fails{place_of(error)}: {describe(error)}") from error


def required(part: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the part has a parameter for, without a default."""
    parameters = parameters_of(part)
    return {key: value for key, value in values.items() if parameters.get(key) is inspect.Parameter.empty}


def place_of(error: BaseException) -> str:
    """`` at FILE, line N``: where own code failed; empty if only this package did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}, line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_PACKAGE, "<"))]
    # Rather the author's line than that of a library, which it called.
    own = [f for f in frames if not ("site-packages" in f.filename or f.filename.startswith(_PYTHON))]
    return f" at {(own or frames)[-1].filename}, line {(own or frames)[-1].lineno}" if frames else ""


def describe(error: BaseException) -> str:
    """The type and message of an error in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _failed_import(source: str, module: str, error: BaseException) -> UserError:
    return UserError(f"{source}: the import of {module} fails{place_of(error)}: {describe(error)}")


def _where_looked() -> str:
    paths = ", ".join(repr(path) for path in sys.path)
    return (
        "name its file in the setting `code`, or put it on the Python path by PYTHONPATH or pip install "
        f"(looked in `code` and in {shorten(paths, 400)})"
    )


def parameters_of(part: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of a callable's parameters; empty if Python does not know them."""
    try:
        parameters = inspect.signature(part).parameters.values()
    except (TypeError, ValueError):
        return {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p.default for p in parameters if p.kind not in variadic}


def check_arguments(
    setting: str, name: str, part: Callable[..., Any], args: Mapping[str, Any], *given: Any, is_complete: bool = True
) -> None:
    """Raises UserError if a class or function does not take these arguments. With ``is_complete``, it is called with
    nothing else."""
    try:
        signature = inspect.signature(part)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        if is_complete:
            signature.bind(*given, **args)
        else:
            signature.bind_partial(**args)
    except TypeError as error:
        takes = ", ".join(parameters_of(part)) or "none"
        raise UserError(f"{setting}: {name} does not fit its args: {error}; it takes {takes}") from None
