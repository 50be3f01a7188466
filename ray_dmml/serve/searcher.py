"""What one replica does: it decodes and embeds images, searches indexes, and shows their pictures. Without Ray."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ray_dmml.data.decoding import TooManyPixelsError, decode_content, reason_of, to_square
from ray_dmml.embedding.place import Place
from ray_dmml.errors import UserError
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.index.embeddings import Floats
from ray_dmml.index.image_index import ImageIndex, load_index
from ray_dmml.index.queries import find, load_embedders
from ray_dmml.inference import TrainedCohort, TrainedPeer
from ray_dmml.serve.answers import Embedding, PictureSize, Query, RequestError, Result

_SIDES: Mapping[PictureSize, int] = {"small": 256, "large": 1024}
_PICTURES_KEPT = 512  # of each index, some 10 MB
_MAX_FOLDERS = 500
_NUM_EXAMPLES = 14
WATCH_PERIOD_S = 1.0

logger = logging.getLogger(__name__)


@dataclass
class _Served:
    """An index in use. A reload puts another one in its place."""

    index: ImageIndex
    signature: tuple[int, ...]
    """Of its index.json, to see that it has changed."""
    version: str
    folders: list[str] = field(init=False)
    """In the root of the index, as far as they are not too many for a list."""
    examples: list[tuple[int, str]] = field(init=False)
    """Id and path of some images, from the first one to the last."""
    picture: Any = field(init=False)
    """(id, side) -> JPEG. The last ones are kept."""
    warning: str = ""
    """The last message about a newer index that cannot be used. It is logged once."""

    def __post_init__(self) -> None:
        first = pc.extract_regex(self.index.rows["path"], r"^(?P<folder>[^/]+/)")
        names = pc.unique(pc.struct_field(first, "folder")).drop_null()
        self.folders = sorted(names.to_pylist())[:_MAX_FOLDERS]
        rows = self.index.rows
        some = rows.take(np.unique(np.linspace(0, len(rows) - 1, min(_NUM_EXAMPLES, len(rows))).astype(np.int64)))
        self.examples = list(zip(some["id"].to_pylist(), some["path"].to_pylist(), strict=True))
        self.picture = lru_cache(maxsize=_PICTURES_KEPT)(self._picture)

    def _picture(self, id: int, side: int) -> bytes:
        [path] = self.index.paths([id])
        root = self.index.root
        if root is None or os.path.normpath(path).startswith((os.pardir, os.sep)):
            raise OSError("it is not in the root of the index")
        pixels = decode_content(Place(root).read(path), at_least=side)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.thumbnail((side, side))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=85)
        return content.getvalue()


class Searcher:
    """The indexes of one run with the nets that embed queries. Its methods may be called by several threads.

    Args:
        folders: of the indexes.
        run: the folder of the run. None: where it was when the images were embedded.
        trust_code: build own backbones that the run's config names.
        max_pixels: of an image that is decoded.

    Raises:
        UserError: a folder is not an index, or the run is not there, or does not belong to the indexes.
    """

    def __init__(
        self, folders: Sequence[str], run: str | None = None, *, trust_code: bool = False, max_pixels: int = 50_000_000
    ) -> None:
        loaded = [_load(Path(folder)) for folder in folders]
        self._served = dict(zip(_names(loaded), loaded, strict=True))
        models = load_embedders([served.index for served in loaded], run, trust_code=trust_code)
        self._models = dict(zip(self._served, models, strict=True))
        self._max_pixels = max_pixels

    def decode(self, content: bytes) -> Tensor:
        """Decodes an uploaded image to uint8 (3, S, S). Raises RequestError."""
        if not content:
            raise RequestError(400, "the image is empty")
        try:
            pixels = decode_content(np.frombuffer(bytearray(content), np.uint8), max_pixels=self._max_pixels)
        except UnidentifiedImageError:
            raise RequestError(415, "it is not an image in a known format") from None
        except TooManyPixelsError:
            raise RequestError(
                413, f"the image has too many pixels; at most {self._max_pixels:,} are decoded"
            ) from None
        except Exception as error:  # decoders raise nearly anything
            raise RequestError(422, f"the image cannot be decoded: {reason_of(error)}") from None
        model = next(iter(self._models.values()))
        return to_square(pixels, model.decode_size, model.resize)

    def answer(self, queries: Sequence[Query]) -> list[list[Result] | RequestError]:
        """Answers several queries together: one result for each index that a query names.

        An index that is reloaded meanwhile does not change the answers.
        """
        served = dict(self._served)
        answers: list[list[Result] | RequestError] = []
        resolved: list[dict[str, int | None]] = []  # for each query, its own row in each of its indexes
        for query in queries:
            try:
                resolved.append(self._own_rows(query, served))
                answers.append([])
            except RequestError as error:
                resolved.append({})
                answers.append(error)
        vectors = self._embed([(query.image, set(own)) for query, own in zip(queries, resolved, strict=True)])
        together: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, own in enumerate(resolved):
            for name in own:
                together[name, queries[number].prefix].append(number)
        found: dict[tuple[int, str], Result] = {}
        for (name, prefix), numbers in together.items():
            index, rows = served[name].index, [resolved[number][name] for number in numbers]
            points = [
                vectors[number, name] if row is None else index.vector(row)
                for number, row in zip(numbers, rows, strict=True)
            ]
            most = max(queries[number].k for number in numbers)
            matches = find(index, np.stack(points), most, own_ids=rows, prefix=prefix)
            for number, row, nearest in zip(numbers, rows, matches, strict=True):
                path = None if row is None else index.paths([row])[0]
                found[number, name] = Result(name, served[name].version, row, path, nearest[: queries[number].k])
        for number, own in enumerate(resolved):
            if own:
                answers[number] = [found[number, name] for name in own]
        return answers

    def embed(self, image: Tensor, name: str = "") -> Embedding:
        """The embedding of a decoded image by the model of an index. Raises RequestError if there is no such index."""
        [name] = self._checked((name,) if name else ())
        vector = self._embed([(image, {name})])[0, name]
        return Embedding(name, self._served[name].index.model, vector)

    def picture(self, name: str, id: int, size: PictureSize) -> bytes:
        """An image of an index as a JPEG of limited size. Raises RequestError if there is none."""
        [name] = self._checked((name,))
        for is_last in (False, True):
            try:
                return self._served[name].picture(id, _SIDES[size])
            except UserError:  # another replica may know a newer index
                if is_last or not self.reload_changed():
                    break
            except Exception as error:  # decoders raise nearly anything
                logger.warning("image %s of the index %s has no picture: %s", id, name, reason_of(error))
                raise RequestError(404, "the image has no picture here") from None
        raise RequestError(404, f"the index {name} has no image {id}")

    def describe(self) -> list[dict[str, Any]]:
        """For each index: its name, size and kind, the folders in it, and the ids of some images."""
        return [
            {
                "name": name,
                "num_images": len(served.index),
                "dimensions": served.index.size,
                "kind": served.index.info.kind,
                "model": served.index.model,
                "version": served.version,
                "folders": served.folders,
                "examples": served.examples,
            }
            for name, served in self._served.items()
        ]

    def reload_changed(self) -> bool:
        """Loads the indexes that have changed on the disk, and then uses them instead. Returns whether there are any.

        An index that is damaged, or of another model, does not replace the one in use.
        """
        has_changed = False
        for name, served in list(self._served.items()):
            try:
                if _signature(served.index.folder) == served.signature:
                    continue
                newer = _load(served.index.folder)
                if newer.index.model != served.index.model:
                    raise UserError(f"{served.index.folder} is now an index of another model; start the server again")
            except (UserError, OSError) as error:
                if str(error) != served.warning:
                    logger.warning("the index %s is not reloaded: %s", name, error)
                    served.warning = str(error)
                continue
            self._served[name] = newer
            has_changed = True
            logger.info("the index %s is reloaded: %d images", name, len(newer.index))
        return has_changed

    def watch(self) -> None:
        """From now on, a thread loads indexes that have changed."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        never = threading.Event()
        while not never.wait(WATCH_PERIOD_S):
            try:
                self.reload_changed()
            except Exception:
                logger.exception("the indexes could not be checked for changes")

    def _checked(self, names: Sequence[str]) -> list[str]:
        known = list(self._served)
        if unknown := next((name for name in names if name not in known), None):
            raise RequestError(404, f"there is no index {unknown!r}; there are {', '.join(known)}")
        return list(dict.fromkeys(names)) or known[:1]

    def _own_rows(self, query: Query, served: Mapping[str, _Served]) -> dict[str, int | None]:
        """The query's own row in each of its indexes; None: it is not an image of them."""
        names = self._checked(query.indexes)
        if query.image is not None:
            return dict.fromkeys(names)
        path = query.path
        try:
            if query.id is not None:
                [path] = served[names[0]].index.paths([query.id])
            assert path is not None
            return {name: served[name].index.id_of(path) for name in names}
        except (UserError, OverflowError):  # the message would name the folder
            what = path if query.id is None or path is not None else f"image {query.id}"
            raise RequestError(404, f"{what} is not in the index {', '.join(names)}") from None

    def _embed(self, wanted: Sequence[tuple[Tensor | None, set[str]]]) -> dict[tuple[int, str], Floats]:
        """The embeddings of images by the models of some indexes, by number and name. A peer embeds an image once."""
        models = {name: self._models[name] for name in self._models if any(name in names for _, names in wanted)}
        by_peer: dict[int, dict[int, Floats]] = {}
        for peer in {id(peer): peer for model in models.values() for peer in _peers(model)}.values():
            numbers = [
                number
                for number, (image, names) in enumerate(wanted)
                if image is not None and any(peer in _peers(models[name]) for name in names)
            ]
            images = [image for image, _ in (wanted[number] for number in numbers) if image is not None]
            if images:
                by_peer[id(peer)] = dict(zip(numbers, peer.embed(torch.stack(images)).cpu().numpy(), strict=True))
        vectors = {}
        for number, (image, names) in enumerate(wanted):
            for name in names if image is not None else ():
                parts = [by_peer[id(peer)][number] for peer in _peers(models[name])]
                is_ensemble = isinstance(models[name], TrainedCohort)
                vectors[number, name] = (
                    ensemble_embedding([part[None] for part in parts])[0] if is_ensemble else parts[0]
                )
        return vectors


def _peers(model: TrainedPeer | TrainedCohort) -> list[TrainedPeer]:
    return list(model.peers.values()) if isinstance(model, TrainedCohort) else [model]


def _load(folder: Path) -> _Served:
    # If the index changes in between, the signature is the old one, and the next look loads it again.
    with suppress(OSError):
        signature = _signature(folder)
        version = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()[:12]
        return _Served(load_index(folder), signature, version)
    load_index(folder)  # it says what is wrong
    raise UserError(f"{folder} cannot be read")


def _signature(folder: Path) -> tuple[int, ...]:
    status = os.stat(folder / "index.json")
    return status.st_mtime_ns, status.st_size, status.st_ino


def _names(loaded: Sequence[_Served]) -> list[str]:
    """A name for each index: its peer, or the name of its folder where two are of one peer."""
    peers = [served.index.info.peer for served in loaded]
    if len(set(peers)) == len(peers):
        return peers
    names = [served.index.folder.resolve().name for served in loaded]
    if len(set(names)) < len(names):
        raise UserError("two of the indexes are of one peer, and their folders have the same name; rename one of them")
    return names
