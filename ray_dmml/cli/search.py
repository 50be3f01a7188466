"""``ray-dmml search``"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_dmml.cli.options import AsJson, MovedRun, TrustCode, path
from ray_dmml.cli.output import print_json, print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console

if TYPE_CHECKING:
    from ray_dmml.index.page import Answer


def search(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="INDEX", help="Folder of an index.")],
    images: Annotated[
        list[Path] | None, typer.Argument(parser=path, metavar="IMAGE", help="Image files, or one folder.")
    ] = None,
    paths: Annotated[
        list[str] | None,
        typer.Option(
            "--path",
            metavar="PATH",
            help="Search for an image of the index by its path there, without itself. Repeatable.",
        ),
    ] = None,
    k: Annotated[
        int,
        typer.Option("-k", min=1, metavar="NUMBER", help="Images for each query. Default: 10.", show_default=False),
    ] = 10,
    threshold: Annotated[
        float | None, typer.Option(metavar="SIMILARITY", help="Leave out images that are less similar, from -1 to 1.")
    ] = None,
    run: MovedRun = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", parser=path, metavar="FILE", help="Write a page with pictures to a new file."),
    ] = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Find the images of an index that are most similar to some images."""
    with user_errors(), show_log(Console(stderr=True)):
        if not images and not paths:
            raise UserError("give images to search for, or images of the index by --path")
        if page is not None and page.exists():
            raise UserError(f"{page} already exists; give another file (--html)")
        if threshold is not None and not -1 <= threshold <= 1:
            raise UserError(f"--threshold must be from -1 to 1, not {threshold:g}")
        answers, root, num_rows = _answers(folder, images or [], paths or [], k, threshold, run, trust_code)
        if page is not None:
            from ray_dmml.atomic_files import replace_file
            from ray_dmml.index.page import search_page

            replace_file(page, search_page(answers, root, num_rows))
    if as_json:
        queries = [{"query": a.name, "results": [match.as_json() for match in a.matches]} for a in answers]
        print_json({"root": root, "queries": queries})
        return
    for answer in answers:
        _print_table(answer, Console())
    if page is not None:
        print_line(Console(), f"pictures: {page}")


def _answers(
    folder: Path,
    images: list[Path],
    paths: list[str],
    k: int,
    threshold: float | None,
    run: Path | None,
    trust_code: bool,
) -> "tuple[list[Answer], str | None, int]":
    """What was found for the images and then for the paths; the index's root and size."""
    import numpy as np

    from ray_dmml.data.image_files import files_of
    from ray_dmml.index.image_index import load_index
    from ray_dmml.index.page import Answer, file_of
    from ray_dmml.index.queries import find, load_embedder

    index = load_index(folder)
    own_ids = [index.id_of(path) for path in paths]
    files = files_of(images[0] if len(images) == 1 else images)
    queries = [np.stack([index.vector(id) for id in own_ids])] if paths else []
    if files:
        queries.insert(0, load_embedder(index, run, trust_code=trust_code).embed_files(files))
    own = [*[None] * len(files), *own_ids]
    lowest = -np.inf if threshold is None else threshold
    found = find(index, np.concatenate(queries), k, threshold=lowest, own_ids=own)
    names = [*map(str, files), *paths]
    pictures = [*files, *(file_of(index.root, path) for path in paths)]
    answers = [Answer(*answer) for answer in zip(names, pictures, found, strict=True)]
    return answers, index.root, len(index)


def _print_table(answer: "Answer", console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from ray_dmml.loggers.tables import print_table

    if not answer.matches:
        print_line(console, f"{answer.name}: nothing is similar enough")
        return
    table = Table("rank", "similarity", "path", title=Text(answer.name), title_justify="left", header_style="bold")
    for column in table.columns[:2]:
        column.justify = "right"
    for match in answer.matches:
        table.add_row(str(match.rank), f"{match.similarity:.4f}", Text(match.path))
    print_table(table, console)
