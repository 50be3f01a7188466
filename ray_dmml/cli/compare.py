"""``ray-dmml compare``"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ray_dmml.cli.options import AsJson, OtherImages, RunWeights, TrustCode, path
from ray_dmml.cli.output import print_json, print_line, show_log, user_errors
from ray_dmml.loggers.figures import heading
from ray_dmml.loggers.output import Console
from ray_dmml.loggers.tables import print_table

SHOWN_METRICS = ("recall@1", "map@r")
SHOWN_NAMES, SHOWN_SETTINGS = 5, 20


def compare(
    runs: Annotated[
        list[Path], typer.Argument(parser=path, metavar="RUN RUN...", help="Folders of runs, the baseline first.")
    ],
    weights: RunWeights = None,
    data: OtherImages = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same images: differences with 95 % intervals, settings, and queries that one finds.

    Runs that differ only in their seed are seeds of one setting. It writes nothing. --json prints every metric and all
    names of queries.
    """
    with user_errors(), show_log(Console(stderr=True)):
        from ray_dmml.training.compare import compare as compare_runs

        results = compare_runs(runs, weights.value if weights else None, data=data, trust_code=trust_code)
    if as_json:
        print_json(results)
        return
    console = Console()
    names = [chr(ord("A") + number) if number < 26 else f"#{number + 1}" for number in range(len(results["settings"]))]
    for name, setting in zip(names, results["settings"], strict=True):
        what = f"{', '.join(setting['weights'])} weights of step {', '.join(map(str, dict.fromkeys(setting['steps'])))}"
        print_line(console, f"{name}: {', '.join(setting['runs'])} ({what})")
    _print_settings(names, results["differing"], console)
    for comparison in results["comparisons"]:
        first, second = names[comparison["first"]], names[comparison["second"]]
        print_line(console, "")
        print_table(_table(first, second, comparison, results), console)
        _print_pairs((first, second), comparison, results, console)
        _print_queries(first, second, comparison["found_only_by"], console)


def _print_settings(names: Sequence[str], differing: Mapping[str, Sequence[Any]], console: Console) -> None:
    if not differing:
        print_line(console, "no setting differs")
        return
    from ray_dmml.config.loading import shorten  # it loads yaml, for which --help should not wait

    table = Table(header_style="bold")
    for title in ("setting", *names):
        table.add_column(title)
    for key, values in list(differing.items())[:SHOWN_SETTINGS]:
        table.add_row(key, *(shorten(str(value), 60) for value in values))
    print_table(table, console)
    if len(differing) > SHOWN_SETTINGS:
        print_line(console, f"and {len(differing) - SHOWN_SETTINGS} more settings (--json)")


def _table(first: str, second: str, comparison: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    what = f"{results['num_queries']:,} queries of {results['num_classes']} {results['split']} classes"
    has_seeds = any(row["seeds_interval"] for each in comparison["systems"].values() for row in each.values())
    table = Table(title=f"{what}, %", title_justify="left", title_style="", header_style="bold")
    for title in ("", "metric", first, second, f"{second} − {first}", "95 % over classes"):
        table.add_column(title, justify="left" if title in ("", "metric") else "right")
    if has_seeds:
        table.add_column(f"95 % over {comparison['num_pairs']} seeds", justify="right")
    for system, metrics in comparison["systems"].items():
        for number, metric in enumerate(SHOWN_METRICS):
            row = metrics[metric]
            cells = [f"{100 * row['first']:.1f}", f"{100 * row['second']:.1f}", f"{100 * row['difference']:+.1f}"]
            cells += [_interval(row["interval"]), *([_interval(row["seeds_interval"])] if has_seeds else [])]
            table.add_row("" if number else system.replace("_", " "), heading(metric), *cells)
    return table


def _print_pairs(
    names: Sequence[str], comparison: Mapping[str, Any], results: Mapping[str, Any], console: Console
) -> None:
    """Which runs are compared, where it is not all of them or they are no pairs."""
    counts = [len(results["settings"][comparison[which]]["runs"]) for which in ("first", "second")]
    num_pairs = comparison["num_pairs"]
    if max(counts) > 1 and not num_pairs:
        print_line(
            console, f"the runs of {' and '.join(names)} are no pairs by seed: the means of all runs are compared"
        )
    elif max(counts) > max(1, num_pairs):
        print_line(console, f"only runs with the same seed are compared: {num_pairs} of {' and '.join(names)} each")


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]"


def _print_queries(first: str, second: str, found_only_by: Mapping[str, Any], console: Console) -> None:
    """Of the ensemble, or of the first system."""
    system = "ensemble" if "ensemble" in found_only_by else next(iter(found_only_by))
    for name, which, other in ((first, "first", second), (second, "second", first)):
        queries = found_only_by[system][which]
        shown = (
            f": {', '.join(queries[:SHOWN_NAMES])}{', ...' if len(queries) > SHOWN_NAMES else ''}" if queries else ""
        )
        label = system.replace("_", " ")
        print_line(console, f"found by the {label} of {name} and not of {other}: {len(queries):,} queries{shown}")
