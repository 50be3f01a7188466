"""The image formats that are read: Pillow's own, and those of installed plug-ins of Pillow."""

from __future__ import annotations

import functools
from contextlib import suppress
from importlib import import_module, metadata
from typing import NamedTuple

import PIL
from PIL import Image

FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD"),
    *("QOI", "SGI", "TIFF", "WEBP", "TGA"),  # a TGA has no signature, so it is tried last
)
"""Pillow's names of its own formats that are read: those of pixels. For EPS it would run Ghostscript."""


class Plugin(NamedTuple):
    """A package that adds a format to Pillow.

    Attributes:
        package: its name for pip.
        module: registers the format when it is imported, or by its ``register_heif_opener``.
        form: Pillow's name of the format.
        suffixes: of its files, for a hint to those who have not installed it.
    """

    package: str
    module: str
    form: str
    suffixes: tuple[str, ...]


PLUGINS = (
    Plugin("pillow-heif", "pillow_heif", "HEIF", (".heic", ".heif", ".hif")),
    Plugin("pillow-jxl-plugin", "pillow_jxl", "JXL", (".jxl",)),
    Plugin("pillow-avif-plugin", "pillow_avif", "AVIF", (".avif",)),  # for a Pillow that was built without
)


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here."""
    Image.init()
    for plugin in PLUGINS:
        if plugin.form not in Image.OPEN and _version(plugin.package):
            with suppress(ImportError, OSError):  # without its shared libraries, it adds no format
                module = import_module(plugin.module)
                getattr(module, "register_heif_opener", lambda: None)()
    known = dict.fromkeys([*(plugin.form for plugin in PLUGINS), *FORMATS])
    return tuple(form for form in known if form in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that can be read here, in lower case, with their dot."""
    readable = {*formats(), "MPO"}  # Pillow opens it as a JPEG
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in readable)


def package_for(suffix: str) -> str | None:
    """The package to install for files of this suffix, if there is one."""
    return next((plugin.package for plugin in PLUGINS if suffix in plugin.suffixes), None)


def decoder_versions() -> tuple[str, ...]:
    """Other versions may decode to other pixels."""
    plugins = (f"{plugin.package} {version}" for plugin in PLUGINS if (version := _version(plugin.package)))
    return (metadata.version("torchvision"), PIL.__version__, *plugins)


def _version(package: str) -> str | None:
    """Its version; None: it is not installed. A file of that name in the working folder is no package."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
