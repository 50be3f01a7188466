"""A small run with indexes of its peers and the ensemble, and the service of them in this process."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny
from index.embedded import write_info, write_shard
from PIL import Image

from ray_dmml import Config, build_index, list_images, load_cohort, train
from ray_dmml.serve.answers import Embedding, PictureSize, Query, RequestError, Result
from ray_dmml.serve.searcher import Searcher
from ray_dmml.serve.settings import ServeSettings


def make_run(images: Path, out: Path, seed: int = 0) -> Path:
    settings = tiny(images, train={"steps": 1}, evaluation={"untrained": False}, seed=seed)
    train(Config.parse(settings), out, local=True)
    return out


def make_index(run: Path, images: Path, out: Path, peer: str, leave_out: Sequence[str] = ()) -> Path:
    """The index of a folder's images by a peer or the ensemble; some may be left for later."""
    cohort = load_cohort(run)
    model = cohort if peer == "ensemble" else cohort.peers[peer]
    files = list_images(images)
    vectors = model.embed_files(files)
    paths = [file.relative_to(images).as_posix() for file in files]
    now = [number for number, path in enumerate(paths) if path not in leave_out]
    write_info(out, vectors.shape[1], model=model.fingerprint, peer=peer, run=str(run), root=str(images))
    write_shard(out, 0, [paths[number] for number in now], [vectors[number] for number in now])
    build_index(out)
    if leave_out:
        later = [number for number, path in enumerate(paths) if path in leave_out]
        write_shard(out, 1, [paths[number] for number in later], [vectors[number] for number in later])
    return out


class InProcess:
    """Answers in the place of replicas. A :class:`~ray_dmml.serve.app.Backend`."""

    def __init__(self, settings: ServeSettings) -> None:
        self.searcher = Searcher(settings.indexes, settings.run, max_pixels=settings.max_pixels)

    async def search(self, image: bytes | None, query: Query) -> list[Result]:
        if image is not None:
            query = replace(query, image=self.searcher.decode(image))
        [answer] = self.searcher.answer([query])
        if isinstance(answer, RequestError):
            raise answer
        return answer

    async def embed(self, image: bytes, index: str) -> Embedding:
        return self.searcher.embed(self.searcher.decode(image), index)

    async def picture(self, index: str, id: int, size: PictureSize) -> bytes:
        return self.searcher.picture(index, id, size)

    async def describe(self) -> list[dict[str, Any]]:
        return self.searcher.describe()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header claims so many pixels, and whose data would unpack to all of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def encoded(form: str, width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form)
    return content.getvalue()
