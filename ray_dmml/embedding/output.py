"""The folder of embeddings: what is in it, and that a shard is there completely or not at all.

embed.json          what made the embeddings, and which lists of images are valid; written last, so a list without an
                    entry is not there
list-000.parquet    the paths of the images, in order; each ``update`` adds another list
part-00000.parquet  a shard: a row for each of the next ``shard_size`` paths of the lists

What a shard contains is given by the lists. So any process can make those that are missing, in any order.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_dmml.atomic_files import replace_file, wait_for_disk
from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError

FACTS = "embed.json"
MUST_AGREE = ("peer", "dtype", "batch_size", "root", "model")
"""Facts that cannot change from one call to the next."""

MAX_SHARD_IMAGES, MAX_SHARD_BATCHES = 4096, 64
_ROWS_AT_A_TIME = 8192  # of a list
_LEFTOVER = re.compile(r"(embed\.json|(list|part)-\d+\.parquet)\.tmp")
_BEFORE_FACTS = re.compile(r"list-\d+\.parquet|" + _LEFTOVER.pattern)


class OutputFolder:
    """The embeddings of one model.

    Attributes:
        num_images: in the lists.
        num_done, num_unreadable: images in the shards that are there, and those of them that could not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_images = self.num_done = self.num_unreadable = 0
        self._facts: dict[str, Any] = {}
        self._done: set[int] = set()

    def create(self) -> None:
        """Makes the folder. Raises UserError if that is not possible, or it holds something else."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.path)
        except OSError as error:
            raise UserError(f"the folder {self.path} cannot be used: {error.strerror}") from None
        # A call that was killed before it had embed.json leaves nothing but a list.
        if FACTS not in names and not all(_BEFORE_FACTS.fullmatch(name) for name in names):
            raise UserError(f"{self.path} is not empty and has no {FACTS}: give another folder (out)")

    def facts(self) -> dict[str, Any] | None:
        """The content of embed.json; None: nothing has begun here. Raises UserError if it is damaged."""
        try:
            facts = json.loads((self.path / FACTS).read_text())
            return facts if facts["lists"] else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path / FACTS} cannot be read: {error}") from None

    def begin(self, facts: Mapping[str, Any], paths: Iterator[bytes], *, update: bool) -> None:
        """Writes the list of images, or compares the one that is there with them.

        Args:
            facts: of embed.json. Those of :data:`MUST_AGREE` must be those of the folder.
            paths: of the images now, in order.
            update: add a list of those that are new.

        Raises:
            UserError: there is no image, the folder is of another model or of other images, or it cannot be written.
        """
        for leftover in filter(_LEFTOVER.fullmatch, os.listdir(self.path)):
            (self.path / leftover).unlink(missing_ok=True)
        before = self.facts()
        if before is None:
            self._facts = {**facts, "lists": []}
            self._add_list(paths)
            if not self._facts["lists"]:
                raise UserError(f"{facts['root']} has no images")
        else:
            self._require_same(facts, before)
            self._facts = before
            if update:
                self._add_list(path for path, is_new in self._changes(paths) if is_new)
            else:
                self._require_no_changes(paths)
        self.num_images = sum(entry["num_images"] for entry in self._facts["lists"])
        self._count_shards()

    def missing(self) -> Iterator[tuple[int, list[bytes]]]:
        """Number and paths of each shard that is not there, in order."""
        first = 0
        for index, entry in enumerate(self._facts["lists"]):
            numbers = range(first, first := first + math.ceil(entry["num_images"] / entry["shard_size"]))
            if not self._done.issuperset(numbers):
                for number, batch in zip(numbers, self._read_list(index, entry["shard_size"]), strict=True):
                    if number not in self._done:
                        yield number, batch

    def write(self, number: int, table: pa.Table) -> None:
        """Writes a shard in one move. Raises UserError if the disk is full."""
        self._replace(_part(number), table)
        self._done.add(number)
        self._count(table.num_rows, table.num_rows - table["error"].null_count)

    def _count_shards(self) -> None:
        for file in self.path.glob("part-*.parquet"):
            try:
                metadata = pq.read_metadata(file)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file} is damaged ({error}): remove it, and it is made again") from None
            column = metadata.schema.names.index("error")
            groups = [metadata.row_group(index).column(column).statistics for index in range(metadata.num_row_groups)]
            self._done.add(int(file.stem.removeprefix("part-")))
            self._count(metadata.num_rows, metadata.num_rows - sum(group.null_count for group in groups))

    def _count(self, num_rows: int, num_unreadable: int) -> None:
        self.num_done += num_rows
        self.num_unreadable += num_unreadable

    def _require_same(self, facts: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        for name in MUST_AGREE:
            if before.get(name) != facts[name]:
                raise UserError(
                    f"{self.path} has embeddings of another {name.replace('_', ' ')}, {before.get(name)} and not "
                    f"{facts[name]}: give another folder (out)"
                )

    def _require_no_changes(self, paths: Iterator[bytes]) -> None:
        counts, examples = {True: 0, False: 0}, {True: "", False: ""}
        for path, is_new in self._changes(paths):
            counts[is_new] += 1
            examples[is_new] = examples[is_new] or printable(os.fsdecode(path))
        words = {True: "new", False: "gone"}
        found = [f"{counts[key]} are {word} ({examples[key]})" for key, word in words.items() if counts[key]]
        if found:
            raise UserError(
                f"the images are not those of {self.path} any more: {', '.join(found)}; with update (--update) new "
                "ones are added, and the rows of others stay"
            )

    def _changes(self, paths: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
        """(path, is new) of each path that is either not listed or not there any more."""
        listed = (self._paths_of(index) for index in range(len(self._facts["lists"])))
        sides = heapq.merge(((path, False) for path in heapq.merge(*listed)), ((path, True) for path in paths))
        for path, group in itertools.groupby(sides, key=itemgetter(0)):
            if len(found := [is_new for _, is_new in group]) == 1:
                yield path, found[0]

    def _paths_of(self, index: int) -> Iterator[bytes]:
        return itertools.chain.from_iterable(self._read_list(index, _ROWS_AT_A_TIME))

    def _read_list(self, index: int, num_rows: int) -> Iterator[list[bytes]]:
        file = self.path / _list(index)
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(num_rows):
                    yield batch.column(0).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"the list of images {file} cannot be read: {error}") from None

    def _add_list(self, paths: Iterable[bytes]) -> None:
        """Writes a list, if there is a path."""
        index, num_images = len(self._facts["lists"]), 0
        file, remaining = self.path / f"{_list(index)}.tmp", iter(paths)
        paths_only = pa.schema([("path", pa.binary())])
        try:
            with pq.ParquetWriter(file, paths_only, compression="zstd", use_dictionary=False) as writer:
                while chunk := list(itertools.islice(remaining, _ROWS_AT_A_TIME)):
                    writer.write_table(pa.table({"path": chunk}, paths_only))
                    num_images += len(chunk)
            if not num_images:
                file.unlink()
                return
            wait_for_disk(file)
            os.replace(file, self.path / _list(index))
        except OSError as error:
            raise UserError(f"the list of images {file} cannot be written: {error}") from None
        entry = {"num_images": num_images, "shard_size": shard_size(num_images, self._facts["batch_size"])}
        self._facts["lists"].append(entry)
        self._facts["num_images"] = sum(entry["num_images"] for entry in self._facts["lists"])
        replace_file(self.path / FACTS, json.dumps(self._facts, indent=1) + "\n", sync=True)

    def _replace(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        # Embeddings do not compress, and their numbers are all different.
        codecs = {column: "NONE" if column == "embedding" else "ZSTD" for column in table.column_names}
        codecs["embedding.list.element"] = "NONE"
        pq.write_table(table, sink, compression=codecs, use_dictionary=["error"], row_group_size=table.num_rows)
        replace_file(self.path / name, sink.getvalue().to_pybytes(), sync=True)


def shard_size(num_images: int, batch_size: int) -> int:
    """Images a shard: whole batches, so that an image's batch does not depend on the shards. A few images are many
    shards, so that all processes are busy to the end, and many images are not too many files: in batches of 64 images,
    391 files for 100,000 images, 1,042 for a million, and 3,189 for ten million."""
    num_batches = math.ceil(num_images / batch_size)
    most = max(1, min(MAX_SHARD_BATCHES, MAX_SHARD_IMAGES // batch_size))
    return batch_size * min(most, max(1, math.isqrt(num_batches) // 8))


def _part(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _list(index: int) -> str:
    return f"list-{index:03d}.parquet"
