"""``ray-dmml export``"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_dmml.cli.options import AsJson, Run, RunWeights, TrustCode, path
from ray_dmml.cli.output import print_json, print_line, show_log, user_errors
from ray_dmml.loggers.output import Console

Format = StrEnum("Format", ["onnx", "torch"])
Precision = StrEnum("Precision", ["fp32", "fp16", "int8"])


def export(
    run: Run,
    out: Annotated[Path, typer.Option(parser=path, metavar="FILE", help="The file to write; it must not exist.")],
    peer: Annotated[
        str,
        typer.Option(metavar="NAME", help="A peer, or ensemble (all peers). Default: ensemble.", show_default=False),
    ] = "ensemble",
    format: Annotated[
        Format,
        typer.Option(metavar="onnx|torch", help="ONNX, or torch.export (.pt2). Default: onnx.", show_default=False),
    ] = Format.onnx,
    precision: Annotated[
        Precision,
        typer.Option(
            metavar="fp32|fp16|int8",
            help="int8 (dynamic quantisation) is for ONNX only. Default: fp32.",
            show_default=False,
        ),
    ] = Precision.fp32,
    weights: RunWeights = None,
    images: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="PLACE",
            help="Images that the file is compared with PyTorch on: a folder with one folder a class, or a manifest "
            "(CSV). Default: the run's own.",
        ),
    ] = None,
    license: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="Licence of the weights, for the metadata. Default: not stated.", show_default=False
        ),
    ] = "not stated",
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Write trained peers as a file that runs without this package: decoded images in, embeddings out.

    The file is compared with PyTorch on real images. If it differs by more than 1e-4 (fp32) or 0.2 points of Recall@1
    (fp16, int8), there is no file, and the exit code is 2.
    """
    with user_errors(), show_log(Console(stderr=True)):
        from ray_dmml.exporting.export import export as export_run

        report = export_run(
            run,
            out,
            peer=peer,
            format=format.value,
            precision=precision.value,
            weights=weights.value if weights else None,
            images=images,
            license=license,
            trust_code=trust_code,
        )
    if as_json:
        print_json(report)
    else:
        _print_report(report, Console())


def _print_report(report: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    from ray_dmml.loggers.tables import print_table

    title = f"{report['num_images']:,} {report['split']} images, {report['peer']} of {report['embedding_size']}-d"
    table = Table(title=title, title_justify="left", title_style="", header_style="bold")
    table.add_column("")
    for heading in ("R@1, %", "images/s", "largest difference"):
        table.add_column(heading, justify="right")
    names = {"pytorch": "PyTorch", "file": f"{report['format']} {report['precision']}"}
    for key, name in names.items():
        difference = f"{report['largest_difference']:.1e}" if key == "file" else ""
        recall, speed = 100 * report["recall@1"][key], report["images_per_second"][key]
        table.add_row(name, f"{recall:.2f}", f"{speed:,.0f}", difference)
    print_table(table, console)
    print_line(console, f"exported to {report['file']} ({report['bytes'] / 1e6:,.1f} MB)")
