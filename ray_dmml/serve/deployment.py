"""The search service on Ray Serve: one gateway, and replicas that embed and search.

The gateway reads requests and never decodes an image. If the replica that works on a request dies, the gateway gives it
to another one. Ray Serve reads the annotation of :func:`build`, so annotations are not postponed here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ray_dmml.serve.answers import Embedding, PictureSize, Query, RequestError, Result
from ray_dmml.serve.app import build_app
from ray_dmml.serve.settings import ServeSettings

ATTEMPTS = 3
"""A request is given to so many replicas. An image on which a decoder crashes ends no more of them."""
DESCRIPTION_KEPT_S = 1.0

T = TypeVar("T")


class Replica:
    """Embeds and searches on one core. Requests that wait go through the net together."""

    def __init__(self, settings: ServeSettings) -> None:
        from ray_dmml.serve.searcher import Searcher  # with torch, which the gateway does not load

        self._searcher = Searcher(
            settings.indexes, settings.run, trust_code=settings.trust_code, max_pixels=settings.max_pixels
        )
        self._searcher.watch()
        # One image at a time is decoded, so that the memory is bounded; pictures do not wait for searches.
        self._decoding, self._drawing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._answer.set_max_batch_size(settings.batch_size)
        self._answer.set_batch_wait_timeout_s(settings.batch_wait_s)

    async def search(self, image: bytes | None, query: Query) -> list[Result] | RequestError:
        try:
            if image is not None:
                query = replace(query, image=await self._in(self._decoding, self._searcher.decode, image))
            return await self._answer(query)
        except RequestError as error:
            return error  # raised, it would arrive as an error of Ray with a traceback

    async def embed(self, image: bytes, index: str) -> Embedding | RequestError:
        try:
            decoded = await self._in(self._decoding, self._searcher.decode, image)
            return await self._in(self._decoding, self._searcher.embed, decoded, index)
        except RequestError as error:
            return error

    async def picture(self, index: str, id: int, size: PictureSize) -> bytes | RequestError:
        try:
            return await self._in(self._drawing, self._searcher.picture, index, id, size)
        except RequestError as error:
            return error

    async def describe(self) -> list[dict[str, Any]]:
        return self._searcher.describe()

    @serve.batch  # type: ignore[untyped-decorator]
    async def _answer(self, queries: list[Query]) -> list[list[Result] | RequestError]:
        return await asyncio.to_thread(self._searcher.answer, queries)

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)


class Replicas:
    """The replicas, seen from the gateway. A :class:`~ray_dmml.serve.app.Backend`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._description: tuple[float, list[dict[str, Any]]] = (-DESCRIPTION_KEPT_S, [])

    async def search(self, image: bytes | None, query: Query) -> list[Result]:
        return await _answer_of(lambda: self._handle.search.remote(image, query))

    async def embed(self, image: bytes, index: str) -> Embedding:
        return await _answer_of(lambda: self._handle.embed.remote(image, index))

    async def picture(self, index: str, id: int, size: PictureSize) -> bytes:
        return await _answer_of(lambda: self._handle.picture.remote(index, id, size))

    async def describe(self) -> list[dict[str, Any]]:
        since, description = self._description
        if time.monotonic() - since >= DESCRIPTION_KEPT_S:  # anybody may ask for the health
            description = await _answer_of(lambda: self._handle.describe.remote())
            self._description = time.monotonic(), description
        return description


async def _answer_of(call: Callable[[], Awaitable[Any]]) -> Any:
    """Its answer. All requests only read, so they can be asked again."""
    for _ in range(ATTEMPTS):
        try:
            answer = await call()
        except RayActorError:
            continue
        if isinstance(answer, RequestError):
            raise answer
        return answer
    raise RequestError(503, "the replicas that worked on this request have died")


class Gateway:
    """The HTTP interface. It waits for the replicas, and computes nothing."""

    def __init__(self, replicas: DeploymentHandle, settings: ServeSettings) -> None:
        self._replicas, self._settings = replicas, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(Replicas(self._replicas), self._settings)


def build(settings: ServeSettings) -> Application:
    """The application of Ray Serve. A serve.yaml names this function, and has the settings as its ``args``."""
    options: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.batch_size,
                "upscale_delay_s": 5,
                "downscale_delay_s": 300,
            }
        }
    common: dict[str, Any] = {"health_check_period_s": 2.0, "logging_config": {"enable_access_log": False}}
    replica = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=2 * settings.batch_size,  # while one batch is in the net, the next one gathers
        max_constructor_retry_count=3,
        **options,
        **common,
    )
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_concurrent + 10_000,  # it refuses what is too much itself
        **common,
    )
    return gateway.bind(replica.bind(settings), settings)
