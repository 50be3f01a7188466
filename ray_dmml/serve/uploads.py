"""Reads what a client sends: an image as the body, a form with an image, or JSON; within bounds on size and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ray_dmml.errors import first_fault
from ray_dmml.serve.answers import RequestError

MAX_K = 1000
_KINDS_OF_A_FILE = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""What clients say of a file whose kind they do not know; the last one is `curl --data-binary`."""

_MAX_FIELDS = 20
_MAX_FIELD_BYTES = 2**14


class SearchRequest(BaseModel):
    """What to search for, and where. An image that is sent takes the place of path and id."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str | None, Field(description="An image of the index by its path, as results have it.")] = None
    id: Annotated[int | None, Field(ge=0, lt=2**63, description="An image of the first index by its id.")] = None
    k: Annotated[int, Field(ge=1, le=MAX_K, description="How many images to find.")] = 10
    filter: Annotated[
        str, Field(max_length=4096, description="Only images whose path begins with this, such as shoes/")
    ] = ""
    index: Annotated[
        list[str], Field(max_length=100, description="Names of the indexes to search in. Default: the first one.")
    ] = []


class Upload(NamedTuple):
    """An image, unless JSON was sent, and the other fields."""

    image: bytes | None
    request: SearchRequest


async def read_upload(request: Request, max_bytes: int, timeout_s: float) -> Upload:
    """Reads the body of a request. Fields of a form or of JSON replace those of the query string.

    Raises:
        RequestError: it is too large, too slow, or not understood.
    """
    body = await _read_body(request, max_bytes, timeout_s)
    fields: dict[str, Any] = {name: request.query_params[name] for name in request.query_params if name != "index"}
    fields["index"] = request.query_params.getlist("index")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            return Upload(None, SearchRequest.model_validate(fields | _object(body)))
        except ValidationError as error:
            raise RequestError(422, first_fault(error)) from None
    image = body
    if kind == "multipart/form-data":
        image, others = await _read_form(request, body)
        fields |= others
    elif not (kind.startswith("image/") or kind in _KINDS_OF_A_FILE):
        raise RequestError(415, "send an image, a form with an image in the field 'image', or JSON")
    try:
        parsed = SearchRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestError(422, first_fault(error)) from None
    if parsed.path is not None or parsed.id is not None:
        raise RequestError(422, "give an image, or the path or id of one, not both")
    return Upload(image, parsed)


async def _read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    too_large = RequestError(413, f"the image is too large; at most {max_bytes:,} bytes are read")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise too_large
                body += chunk
    except TimeoutError:
        raise RequestError(408, f"the image was not sent within {timeout_s:g} seconds") from None
    except ClientDisconnect:
        raise RequestError(400, "the client has gone") from None
    return bytes(body)


async def _read_form(request: Request, body: bytes) -> tuple[bytes, dict[str, Any]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    )
    parser.spool_max_size = len(body) + 1  # it stays in memory, where it is already
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(400, f"the form is not understood: {error.message}") from None
    except (KeyError, ValueError):  # such as a form without a boundary
        raise RequestError(400, "the form is not understood") from None
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise RequestError(422, "the form has no file in the field 'image'")
    fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str) and name != "index"}
    if names := [name for name in form.getlist("index") if isinstance(name, str)]:
        fields["index"] = names
    return await image.read(), fields


def _object(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object that are given."""
    try:
        given = SearchRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(422, first_fault(error)) from None
    return {name: getattr(given, name) for name in given.model_fields_set}
