"""What every request passes first: headers of safe answers, the server's name, the token, and room for one more."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_dmml.serve.settings import hashed

OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/healthz", "/openapi.json"})
"""Without a token and without a limit: they say nothing of the images, and cost little."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
HANG_UP = {"Connection": "close"}
"""Of an answer to a request whose body is not read to its end. The server would read the rest of it and drop it."""


class Guard:
    """ASGI middleware. It refuses a request before anything of its body is read.

    Args:
        app: what it guards.
        token_sha256: of the bearer token. None: everybody may search.
        max_concurrent: requests at the same time.
        allowed_hosts: names of the server that a request may use. Empty: any.
    """

    def __init__(
        self, app: ASGIApp, token_sha256: str | None, max_concurrent: int, allowed_hosts: Iterable[str]
    ) -> None:
        self._app, self._token_sha256, self._max_concurrent = app, token_sha256, max_concurrent
        self._allowed_hosts = {host.lower() for host in allowed_hosts}
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            if scope["method"] not in ("GET", "HEAD"):
                refusal.headers.update(HANG_UP)
            await refusal(scope, receive, send_with_headers)
            return
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send_with_headers)
            return
        self._num_running += 1
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._num_running -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._allowed_hosts and _name(headers.get("host", "")) not in self._allowed_hosts:
            return _refused(421, "this server has another name; --host or a token lets others reach it")
        if scope["method"] not in ("GET", "HEAD") and headers.get("sec-fetch-site", "") in ("cross-site", "same-site"):
            return _refused(403, "other web pages may not search")
        if scope["path"] in OPEN_PATHS:
            return None
        if self._token_sha256 is not None and not self._is_token(headers.get("authorization", "")):
            return _refused(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        if self._num_running >= self._max_concurrent:
            return _refused(503, "too many requests at the same time", {"Retry-After": "1"})
        return None

    def _is_token(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        # Hashes of equal length are compared, so that the time says nothing of the token.
        is_equal = hmac.compare_digest(hashed(token.strip()), str(self._token_sha256))
        return is_equal and scheme.lower() == "bearer"


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _refused(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": message}, status, headers)
