"""The HTTP interface of a search service, and its web page. What answers may be here or in other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import metadata, resources
from typing import Annotated, Any, Protocol
from urllib.parse import quote

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from ray_dmml.serve.answers import Embedding, PictureSize, Query, RequestError, Result
from ray_dmml.serve.guard import HANG_UP, Guard
from ray_dmml.serve.settings import ServeSettings
from ray_dmml.serve.uploads import SearchRequest, read_upload

HEALTH_TIMEOUT_S = 5.0


class Backend(Protocol):
    """What answers. Its methods raise RequestError."""

    async def search(self, image: bytes | None, query: Query) -> list[Result]:
        """``image`` is the file that was sent; None: the query names an image of the index."""

    async def embed(self, image: bytes, index: str) -> Embedding: ...

    async def picture(self, index: str, id: int, size: PictureSize) -> bytes:
        """A JPEG."""

    async def describe(self) -> list[dict[str, Any]]: ...


class ImageOfIndex(BaseModel):
    id: int
    path: str
    picture: Annotated[
        str, Field(description="Address of a small JPEG, relative to the service. `size=large`: 1024 px")
    ]


class Found(ImageOfIndex):
    rank: int
    similarity: float


class FoundInIndex(BaseModel):
    index: str
    query: Annotated[ImageOfIndex | None, Field(description="The query, if it is an image of the index.")]
    matches: list[Found]


class SearchAnswer(BaseModel):
    results: Annotated[list[FoundInIndex], Field(description="One for each index.")]


class EmbedAnswer(BaseModel):
    index: str
    model: Annotated[str, Field(description="Embeddings of other models must not be compared with this one.")]
    embedding: list[float]


class ServedIndex(BaseModel):
    name: str
    num_images: int
    dimensions: int
    kind: str
    model: str
    version: str
    folders: list[str]
    examples: Annotated[list[ImageOfIndex], Field(description="Some images to begin with.")]


class ServiceInfo(BaseModel):
    indexes: list[ServedIndex]
    max_upload_bytes: int
    max_pixels: int


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FIELDS: dict[str, Any] = SearchRequest.model_json_schema()["properties"]


def _body(*names: str, with_json: bool) -> dict[str, Any]:
    """The parameters and bodies that ``read_upload`` understands, for OpenAPI."""
    parameters = [{"name": name, "in": "query", "required": False, "schema": _FIELDS[name]} for name in names]
    form = {"image": _IMAGE["schema"]} | {name: _FIELDS[name] for name in names}
    content: dict[str, Any] = {
        "image/*": _IMAGE,
        "application/octet-stream": _IMAGE,
        "multipart/form-data": {"schema": {"type": "object", "required": ["image"], "properties": form}},
    }
    if with_json:
        content["application/json"] = {"schema": SearchRequest.model_json_schema()}
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def build_app(backend: Backend, settings: ServeSettings) -> FastAPI:
    """The ASGI application of a search service."""
    app = FastAPI(
        title="ray-dmml search",
        version=metadata.version("ray-dmml"),
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(
        Guard,
        token_sha256=settings.token_sha256,
        max_concurrent=settings.max_concurrent,
        allowed_hosts=settings.allowed_hosts,
    )

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        # No Retry-After: the same image would end more replicas if a decoder crashes on it.
        headers = HANG_UP if error.status in (408, 413) else None
        return JSONResponse({"detail": error.message}, error.status, headers)

    @app.post("/search", openapi_extra=_body("k", "filter", "index", with_json=True))
    async def search(request: Request) -> SearchAnswer:
        """Finds the images that are most similar to an image that is sent, or to one of the index."""
        image, asked = await read_upload(request, settings.max_upload_bytes, settings.upload_timeout_s)
        if image is None and (asked.path is None) == (asked.id is None):
            raise RequestError(422, "give an image, or either the path or the id of one")
        query = Query(tuple(asked.index), None, asked.path, asked.id, asked.k, asked.filter)
        return SearchAnswer(results=[_shown(result) for result in await backend.search(image, query)])

    @app.post("/embed", openapi_extra=_body("index", with_json=False))
    async def embed(request: Request) -> EmbedAnswer:
        """Embeds an image as the images of an index were embedded."""
        image, asked = await read_upload(request, settings.max_upload_bytes, settings.upload_timeout_s)
        if image is None or len(asked.index) > 1 or asked.model_fields_set != {"index"}:
            raise RequestError(422, "give one image, and at most one index and nothing else")
        answer = await backend.embed(image, *asked.index or [""])
        return EmbedAnswer(index=answer.index, model=answer.model, embedding=answer.vector.tolist())

    @app.get("/images/{index}/{id}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def picture(index: str, id: Annotated[int, Path(ge=0, lt=2**63)], size: PictureSize = "small") -> Response:
        """An image of an index, as a new JPEG of limited size."""
        content = await backend.picture(index, id, size)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    @app.get("/indexes")
    async def indexes() -> ServiceInfo:
        """What can be searched, and how large an image may be."""
        described = []
        for index in await backend.describe():
            examples = [_image(index["name"], index["version"], id, path) for id, path in index["examples"]]
            described.append(ServedIndex(**index | {"examples": examples}))
        return ServiceInfo(
            indexes=described, max_upload_bytes=settings.max_upload_bytes, max_pixels=settings.max_pixels
        )

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether searches are answered: 200 or 503."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await backend.describe()
        except TimeoutError:
            raise RequestError(503, "no replica answers") from None
        return {"status": "ok"}

    _add_page(app)
    return app


def _add_page(app: FastAPI) -> None:
    folder = resources.files("ray_dmml.serve") / "page"
    files = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")}
    files["/page.js"] = ("page.js", "text/javascript")
    for address, (name, kind) in files.items():
        app.add_route(address, _file((folder / name).read_bytes(), kind), include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return serve


def _image(index: str, version: str, id: int, path: str) -> ImageOfIndex:
    # Another version of the index may have another image of this id, so that the address must differ.
    return ImageOfIndex(id=id, path=path, picture=f"images/{quote(index, safe='')}/{id}?version={version}")


def _shown(result: Result) -> FoundInIndex:
    query = None
    if result.query_id is not None and result.query_path is not None:
        query = _image(result.index, result.version, result.query_id, result.query_path)
    matches = [
        Found(rank=m.rank, similarity=m.similarity, **dict(_image(result.index, result.version, m.id, m.path)))
        for m in result.matches
    ]
    return FoundInIndex(index=result.index, query=query, matches=matches)
