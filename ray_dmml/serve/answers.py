"""Messages between the gateway and the replicas of a search service. The gateway loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from ray_dmml.index.embeddings import Floats
    from ray_dmml.index.match import Match

PictureSize = Literal["small", "large"]


class RequestError(Exception):
    """A request cannot be answered. The message is for the client, and names no file of the server."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)  # so that it can be sent to another process
        self.status, self.message = status, message


@dataclass(frozen=True)
class Query:
    """A search with one image.

    Attributes:
        indexes: names of the indexes to search in. Empty: the first one.
        image: a decoded image, uint8 (3, S, S).
        path: or an image of the indexes by its path.
        id: or an image of the first index by its id.
        k: images in a result.
        prefix: only images whose path begins with it.
    """

    indexes: tuple[str, ...] = ()
    image: Tensor | None = None
    path: str | None = None
    id: int | None = None
    k: int = 10
    prefix: str = ""


@dataclass(frozen=True)
class Result:
    """What was found in one index.

    Attributes:
        index: its name.
        version: of the index.
        query_id: the id of the query, if it is an image of the index.
        query_path: its path.
        matches: the most similar first.
    """

    index: str
    version: str
    query_id: int | None
    query_path: str | None
    matches: list[Match]


@dataclass(frozen=True)
class Embedding:
    """The embedding of an image by the model of an index: its name, the model's hash, and (D,) float32."""

    index: str
    model: str
    vector: Floats
