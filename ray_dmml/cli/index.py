"""``ray-dmml index``"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ray_dmml.cli.options import AsJson, path
from ray_dmml.cli.output import print_json, print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console

if TYPE_CHECKING:
    from ray_dmml.index.store import Kind

Kinds = StrEnum("Kinds", ["flat", "ivf"])


def index(
    embeddings: Annotated[
        Path, typer.Argument(parser=path, metavar="DIR", help="Folder that `ray-dmml embed` has written.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="DIR", help="Folder of the index. Default: beside the embeddings."),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the 10 most similar images that a search has to find in a large index. Default: 0.95.",
        ),
    ] = None,
    kind: Annotated[
        Kinds | None,
        typer.Option(
            metavar="flat|ivf",
            help="flat: exact search. ivf: a search reads some lists. Default: flat up to 200,000 images.",
        ),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Add the images that were embedded since.")] = False,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE", help="Remove the image of this path. Repeatable.")
    ] = None,
    remove_from: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Remove the images that this file names, one path a line."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an index of embeddings, in which `ray-dmml search` finds similar images.

    With --update or --remove, change an index. The ids of other images stay.
    """
    with user_errors(), show_log(Console(stderr=True)):
        removes = bool(remove or remove_from)
        if update + removes + overwrite > 1:
            raise UserError("--update, --remove and --overwrite are different commands; give one of them")
        if (update or removes) and kind:
            raise UserError("--kind belongs to a new index; build it again with --overwrite")
        if removes and recall is not None:
            raise UserError("--recall goes with a new index or --update")
        from ray_dmml.index.build import build_index, remove_rows, update_index
        from ray_dmml.index.image_index import load_index

        folder = out or embeddings
        if removes:
            before = len(load_index(folder))
            built = remove_rows(folder, [*(remove or []), *(_lines(remove_from) if remove_from else [])])
        elif update:
            before = len(load_index(folder))
            built = update_index(embeddings, folder, recall=recall)
        else:
            before, target = 0, 0.95 if recall is None else recall
            chosen = cast("Kind | None", kind and kind.value)
            built = build_index(embeddings, folder, kind=chosen, recall=target, overwrite=overwrite)
    info = built.info
    if as_json:
        print_json(info.model_dump() | {"folder": str(folder)})
        return
    console = Console()
    if update or removes:
        print_line(console, f"images {'removed' if removes else 'added'}: {abs(len(built) - before):,}")
    left_out = f" ({info.num_unreadable:,} unreadable and left out)" if info.num_unreadable else ""
    print_line(console, f"{folder}: {len(built):,} images{left_out}, {info.peer}, {info.size} dimensions")
    if info.kind == "flat":
        print_line(console, "flat: every search is exact")
    else:
        recall_found = f"recall@{info.recall.k} {info.recall.measured:.3f} on {info.recall.num_queries:,} of the images"
        print_line(console, f"ivf: a search reads {info.num_probed:,} of {info.num_lists:,} lists, {recall_found}")


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{file} cannot be read: {reason}") from None
