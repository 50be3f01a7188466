"""The settings of a search service: those of `ray-dmml serve`, and the arguments in its serve.yaml."""

from __future__ import annotations

import hashlib
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""The names under which a browser on this machine knows it."""


class ServeSettings(BaseModel):
    """What a search service serves, and its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    indexes: Annotated[list[str], Field(min_length=1)]
    """Folders of indexes of one run: a peer's, the ensemble's, or several, which can be compared."""
    run: str | None = None
    """The folder of the run. None: where it was when the images were embedded."""
    trust_code: bool = False
    """Build own backbones that the run's config names."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """If it is larger than ``min_replicas``, replicas start when requests wait, and end when they idle."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """The most images that go through the net together."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.01
    """How long an image waits for others."""
    max_concurrent: Annotated[int, Field(ge=1)] = 128
    """Requests at the same time. Beyond it the answer is 503, with a Retry-After."""
    max_upload_bytes: Annotated[int, Field(ge=1)] = 20 * 10**6
    max_pixels: Annotated[int, Field(ge=1)] = 50 * 10**6
    """Of an uploaded image. A pixel takes 3 bytes, and more while it is decoded."""
    upload_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A client that has not sent its image by then gets the answer 408."""
    token_sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None
    """SHA-256 of the bearer token. None: everybody who can connect may search."""
    allowed_hosts: list[str] = []
    """Names of the server that a request may use. Empty: any. It keeps web pages elsewhere, whose names an attacker
    lets point at this machine, from the service of a developer."""

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be below min_replicas")
        return self


def hashed(token: str) -> str:
    """SHA-256 of a token, in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()
