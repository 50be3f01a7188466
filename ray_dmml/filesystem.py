"""Opens folders of any file system by their URI, through pyarrow."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs

CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 10, 30
"""Limits of one attempt; S3 makes three. A Google server that accepts a request and falls silent fails after two
minutes, because pyarrow does not pass a timeout to its client."""


def open_uri(uri: str, *, make: bool = True) -> tuple[fs.FileSystem, str]:
    """Returns the file system and the folder in it.

    Args:
        uri: a folder, ``file://``, ``s3://bucket/folder`` or ``gs://bucket/folder``, with options as a query.
        make: create a folder of this machine that does not exist.

    Raises:
        ValueError, TypeError, NotImplementedError: the URI is not understood.
        OSError: the file system cannot be reached.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        folder = Path(unquote(parts.path) if parts.scheme else uri).expanduser().absolute()
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        return fs.LocalFileSystem(), str(folder)
    if parts.scheme == "s3":  # pyarrow's own reading of the URI has no timeouts
        if ":" in parts.netloc and "@" not in parts.netloc and "@" in uri:
            raise ValueError("a '/' in its key is written %2F, a '?' %3F and a '#' %23")
        bucket = parts.netloc.rpartition("@")[2]
        if not bucket:
            raise ValueError("it names no bucket")
        flags = {"true": True, "false": False}
        options: dict[str, object] = {k: flags.get(v, v) for k, v in parse_qsl(parts.query)}
        if parts.username:
            options["access_key"] = unquote(parts.username)
            options["secret_key"] = unquote(parts.password or "")
        # Servers other than Amazon's are usually set by these, which S3FileSystem does not read.
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            if os.environ.get(name):
                options.setdefault("endpoint_override", os.environ[name])
        if "region" not in options and "endpoint_override" not in options:
            options["region"] = fs.resolve_s3_region(bucket)
        options = {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": REQUEST_TIMEOUT_S, **options}
        return fs.S3FileSystem(**options), (bucket + parts.path).rstrip("/")
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
        uri += f"{'&' if parts.query else '?'}retry_limit_seconds={REQUEST_TIMEOUT_S}"
    return fs.FileSystem.from_uri(uri)


def reason(error: Exception) -> str:
    """The first line of what pyarrow raised, without secrets."""
    lines = str(error).splitlines() or [type(error).__name__]
    return without_secrets(lines[0]).rstrip(".")


def without_secrets(text: str) -> str:
    """The text with each URI stripped of user name, password and query.

    Secrets of AWS contain slashes, and not everybody escapes them, so everything up to the last @ is removed. If that
    is behind a question mark, a secret looks like a query, and nothing is shown.
    """

    def strip(uri: re.Match[str]) -> str:
        scheme = uri[1] or ""
        place, _, query = uri[2].partition("?")
        if scheme.lower() != "file:":  # folders may have an @
            place = "..." if "@" in query else place.rpartition("@")[2]
        return f"{scheme}//{place}"

    return re.sub(r"(\w*:)?//(\S*)", strip, text)
