"""Checks of the installed libraries: versions, extras, torch and faiss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from ray_dmml.doctor.check import Check

PACKAGE = "ray-dmml"

SHOWN = ("ray-dmml", "torch", "torchvision", "ray", "timm", "numpy", "faiss-cpu", "pytorch-metric-learning")
"""Libraries whose versions a report of a fault needs."""

NOT_FOR_RUNS = {"test", "page-test", "dev", "docs"}  # extras

WITHOUT_SIMD = {"NONE", "GENERIC"}  # faiss's names


def requirements_of(package: str) -> list[Requirement]:
    """What a package says that it needs, with and without extras; nothing if it is not installed."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Requirement(line))
        except InvalidRequirement:  # of an old package
            continue
    return found


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions by name; those that are not installed are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def unmet(requirements: Sequence[Requirement], installed: Mapping[str, str], extra: str = "") -> list[str]:
    """What is missing or too old, such as ``torch>=2.6 (installed: 2.5.1)``. With an extra: of that extra alone."""
    faults = []
    for requirement in requirements:
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue
        version = installed.get(requirement.name)
        if version is None:
            faults.append(f"{requirement.name}{requirement.specifier} (not installed)")
        elif not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement.name}{requirement.specifier} (installed: {version})")
    return faults


def versions(python: str, installed: Mapping[str, str], faults: Mapping[str, Sequence[str]]) -> Check:
    """Versions, and what does not go together.

    Args:
        python: the version of Python.
        installed: versions by name.
        faults: what :func:`unmet` found, by the package that needs it.
    """
    named = {"python": python, **{name: installed[name] for name in SHOWN if name in installed}}
    message = ", ".join(f"{name} {version}" for name, version in named.items())
    lines = [f"{package} needs {', '.join(missing)}" for package, missing in faults.items() if missing]
    if not lines:
        return Check(name="versions", state="ok", message=message, facts=named)
    advice = "Install versions that go together: pip install --upgrade ray-dmml torch torchvision"
    return Check(name="versions", state="problem", message="; ".join([message, *lines]), advice=advice, facts=named)


def extras(present: Sequence[str], absent: Sequence[str]) -> Check:
    """Extras whose packages are all there, and the others."""
    facts = {"present": list(present), "absent": list(absent)}
    message = f"installed: {', '.join(present) or 'none'}"
    if absent:
        message += f"; not: {', '.join(absent)} (pip install 'ray-dmml[NAME]')"
    return Check(name="extras", state="ok", message=message, facts=facts)


def extras_of(requirements: Sequence[Requirement]) -> list[str]:
    """Names of the extras that a user may want, in alphabetical order."""
    named = {
        name
        for requirement in requirements
        for name in re.findall(r"extra == ['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
    }
    return sorted(named - NOT_FOR_RUNS)


def faiss(level: str, cpu_flags: set[str]) -> Check:
    """The instructions that faiss uses, such as ``AVX2``, and those that the CPU has (``flags`` of /proc/cpuinfo)."""
    message, facts = f"uses {level.replace('_', ' ')}", {"instructions": level}
    if level in WITHOUT_SIMD and "avx2" in cpu_flags:
        message = "uses no vector instructions, and this CPU has AVX2: evaluation and search take several times as long"
        advice = "pip install --upgrade faiss-cpu, and unset FAISS_OPT_LEVEL and FAISS_SIMD_LEVEL."
        return Check(name="faiss", state="note", message=message, advice=advice, facts=facts)
    return Check(name="faiss", state="ok", message=message, facts=facts)


def faiss_level() -> str:
    """Raises ImportError if faiss cannot be imported."""
    import faiss as library

    if hasattr(library, "SIMDConfig"):  # since 1.15 it chooses when it runs
        return str(library.SIMDConfig.get_level_name())
    words = library.get_compile_options().replace("OPTIMIZE", "").split()
    return str(words[0]) if words else "GENERIC"


def broken(name: str, error: Exception) -> Check:
    """A library that cannot be imported."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    message = f"cannot be imported: {reason}"
    advice = f"Install it again: pip install --force-reinstall --no-cache-dir {name}"
    return Check(name=name, state="problem", message=message, advice=advice)
