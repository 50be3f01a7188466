"""``ray-dmml embed``"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ray_dmml.cli.lifecycle import Interruptible
from ray_dmml.cli.options import Address, AsJson, Run, RunWeights, TrustCode, not_empty, path, use_address
from ray_dmml.cli.output import elapsed, print_json, print_line, show_log, user_errors
from ray_dmml.loggers.output import Console, duration

if TYPE_CHECKING:
    from ray_dmml.embedding.embedder import Dtype

Dtypes = StrEnum("Dtypes", ["float32", "float16"])

LINE_EVERY_S = 30.0
"""Where there is no terminal."""


def embed(
    run: Run,
    images: Annotated[
        str,
        typer.Argument(
            parser=not_empty,
            metavar="IMAGES",
            help="A folder, a manifest (CSV with a column path), or a URI such as s3://bucket/photos.",
        ),
    ],
    out: Annotated[Path, typer.Option(parser=path, metavar="DIR", help="Folder of the embeddings.")],
    peer: Annotated[
        str,
        typer.Option(
            metavar="NAME|ensemble",
            help="Embed with one peer, or with all of them. Default: ensemble.",
            show_default=False,
        ),
    ] = "ensemble",
    weights: RunWeights = None,
    dtype: Annotated[
        Dtypes,
        typer.Option(
            metavar="float32|float16", help="Type of the numbers in the files. Default: float32.", show_default=False
        ),
    ] = Dtypes.float32,
    root: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="DIR", help="Folder that the paths of a manifest are in. Default: the manifest's."
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Add images that are new since DIR was begun. Rows of others stay.")
    ] = False,
    address: Address = None,
    local: Annotated[bool, typer.Option("--local", help="Embed in this process, without Ray: the same rows.")] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Processes, or threads with --local. Default: one for each GPU, or else each core."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images that the nets get at a time. Default: 64.")
    ] = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Embed images with the peers of a run, into Parquet files.

    The same command continues what was interrupted. An unreadable image is a row with its error.
    """
    console, began = Console(stderr=as_json), time.monotonic()
    use_address(address)
    with user_errors(), Interruptible(console) as signals, show_log(console):
        signals.resume_with("the same command", out / "embed.json")
        from ray_dmml.embedding.embed import embed as embed_images

        with show_progress(console) as progress:
            result = embed_images(
                run,
                images,
                out,
                peer=peer,
                weights=weights.value if weights else None,
                dtype=cast("Dtype", dtype.value),
                root=root,
                update=update,
                local=local,
                concurrency=concurrency,
                batch_size=batch_size,
                trust_code=trust_code,
                on_progress=progress,
            )
        if as_json:
            print_json(result)
        print_line(console, f"{_summary(result)}: {out}  ({elapsed(began)})")


def _summary(result: dict[str, Any]) -> str:
    unreadable = result["num_unreadable"]
    found = f", {unreadable:,} of them unreadable (see the column error)" if unreadable else ""
    return f"embeddings of {result['num_images']:,} images{found}"


class Progress:
    """Prints how far it is: a bar on a terminal, else a line now and then."""

    def __init__(self, console: Console, bar: Any) -> None:
        self._console, self._bar = console, bar
        self._task = bar.add_task("starting", total=None, rate="")
        self._num_calls, self._first = 0, (0.0, 0)
        self._next_line = time.monotonic() + LINE_EVERY_S

    def __call__(self, done: int, total: int, unreadable: int) -> None:
        now = time.monotonic()
        if self._num_calls == 0 and 0 < done < total:
            print_line(self._console, f"{done:,} of {total:,} images are there already")
        if self._num_calls < 2:  # the first shard has waited for Ray, libraries and nets to start
            self._num_calls, self._first = self._num_calls + 1, (now, done)
        began, before = self._first
        rate = f"{(done - before) / (now - began):.1f} images/s" if done > before else ""
        found = f"{unreadable:,} unreadable"
        self._bar.update(self._task, description=found, completed=done, total=total, rate=rate)
        if not self._console.is_terminal and rate and now >= self._next_line:
            self._next_line = now + LINE_EVERY_S
            left = duration((total - done) * (now - began) / (done - before))
            print_line(self._console, f"{done:,} of {total:,} images  {rate}  {left} left  {found}")


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """The bar, for the length of the block."""
    from rich import progress as rich

    columns = [rich.SpinnerColumn("line" if console.options.ascii_only else "dots"), rich.MofNCompleteColumn()]
    columns += [rich.BarColumn(bar_width=None), rich.TextColumn("{task.fields[rate]}"), rich.TimeRemainingColumn(True)]
    columns += [rich.TextColumn("{task.description}")]
    with rich.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Progress(console, bar)
