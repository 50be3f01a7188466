"""Makes a report of one or several runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_dmml.config.schema import Config
from ray_dmml.data.decoding import printable
from ray_dmml.evaluation.evaluation import ENSEMBLE, TEACHERS, Evaluation
from ray_dmml.loggers.figures import describe_unevaluated
from ray_dmml.report.agreement import agreement_charts, agreement_table
from ray_dmml.report.curves import (
    MAX_POINTS,
    Metrics,
    NamedMetrics,
    best_validation,
    describe_best,
    loss_charts,
    validation_charts,
)
from ray_dmml.report.data import Card, Cell, Finding, Report, Row, Table, Tile
from ray_dmml.report.described import describe, settings_that_differ
from ray_dmml.report.embedding_map import embedding_map, with_sheets
from ray_dmml.report.gallery import Retrievals, confusions, disagreements, the, worst_classes, worst_queries
from ray_dmml.report.pictures import sheets, thumbnails
from ray_dmml.report.results import results_tables, verification_table
from ray_dmml.report.suspects import CLEAR, suspects

MAX_PICTURE_BYTES = 12 * 2**20
OF_TEACHERS = "ensemble of the teachers"
MAP_SHARE = 0.4
"""Of these bytes, for the pictures on the map."""


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run."""

    path: Path
    config: Config
    environment: Mapping[str, Any]
    """Content of run.json."""

    metrics: Metrics
    results: Mapping[str, Any] | None
    """Content of results.json; None: the run has not ended."""

    evaluation: Evaluation | None = None
    """What its peers find; None: the page has no pictures."""

    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return printable(self.path.absolute().name)

    @property
    def num_steps(self) -> int:
        return max(self.metrics.num_steps, (self.results or {}).get("step") or 0)


def build_report(records: Sequence[RunRecord], *, made: datetime) -> Report:
    """The report of a run, or of several side by side.

    It has everything that is known: a run that has not ended has its settings and curves.
    """
    names = _distinct([record.name for record in records])
    is_one = len(records) == 1
    bests = [best_validation(record.metrics, record.config) for record in records]
    curves = [
        NamedMetrics("" if is_one else f"{name}: ", record.metrics, best)
        for name, record, best in zip(names, records, bests, strict=True)
    ]
    sentences = [describe_best(best, "" if is_one else name) for name, best in zip(names, bests, strict=True) if best]
    ended = [(name, record.results) for name, record in zip(names, records, strict=True) if record.results]
    ended_names, ended_results = [name for name, _ in ended], [results for _, results in ended]
    table, further, results_note = results_tables(ended_names, ended_results)
    verification, verification_note = verification_table(ended_names, ended_results)
    report = Report(
        title=names[0] if is_one else f"{len(names)} runs: {', '.join(names)}",
        made=f"{made:%Y-%m-%d %H:%M}",
        runs=tuple(
            describe(name, record.path, record.config, record.environment, record.results, record.num_steps)
            for name, record in zip(names, records, strict=True)
        ),
        findings=tuple([*_result_findings(ended, is_one), *(Finding(text, "validation") for text in sentences)]),
        warnings=tuple(_warnings(names, records)),
        results=table,
        results_note=results_note,
        further_results=further,
        verification=verification,
        verification_note=verification_note,
        differences=None if is_one else settings_that_differ(names, [record.config for record in records]),
        validation=validation_charts(curves),
        validation_note=" ".join(sentences) or "No classes were held out for validation, or none were evaluated yet.",
        losses=loss_charts(curves, records[0].config),
        losses_note=_losses_note(records),
        agreement_charts=agreement_charts(curves),
        seconds=_seconds(names, records),
    )
    retrievals = _retrievals(names, records)
    if retrievals is not None:
        return _with_pictures(report, retrievals, records)
    if all(record.evaluation is not None for record in records):
        note = "The runs are evaluated on different images, so the page does not compare what they find."
        return replace(report, warnings=(*report.warnings, note))
    return report


def _retrievals(names: Sequence[str], records: Sequence[RunRecord]) -> Retrievals | None:
    """The systems to compare: the peers and the ensemble of a run, or the ensembles of several runs on equal images."""
    evaluations = [record.evaluation for record in records if record.evaluation is not None]
    if not evaluations or len(evaluations) < len(records):
        return None
    first = evaluations[0]
    if len(records) == 1:
        systems = {OF_TEACHERS if name == TEACHERS else name: of for name, of in first.systems.items()}
        main = _main_of(first)
    else:
        digest = first.images.digest()
        if any(evaluation.images.digest() != digest for evaluation in evaluations[1:]):
            return None
        systems = {name: of.systems[_main_of(of)] for name, of in zip(names, evaluations, strict=True)}
        main = names[0]
    return Retrievals(first.images, systems, main, num_tiles=8 if len(systems) <= 4 else 6)


def _main_of(evaluation: Evaluation) -> str:
    """The ensemble, or the only peer."""
    return ENSEMBLE if ENSEMBLE in evaluation.systems else next(iter(evaluation.systems))


def _with_pictures(report: Report, retrievals: Retrievals, records: Sequence[RunRecord]) -> Report:
    """Adds the sections that show images."""
    evaluation = records[0].evaluation
    assert evaluation is not None
    embeddings = evaluation.embeddings[_main_of(evaluation)]
    compared = [name for name in retrievals.systems if len(records) > 1 or name not in (ENSEMBLE, OF_TEACHERS)]
    peers = {name: evaluation.embeddings[name] for name in compared} if len(records) == 1 else {}
    num_suspects, num_clear, suspicious = suspects(retrievals, {**peers, retrievals.main: embeddings})
    classes, groups = worst_classes(retrievals), (worst_queries(retrievals), *disagreements(retrievals, compared))
    confused = confusions(retrievals)
    named = dict.fromkeys(name for pair in confused for name in pair.classes)
    dots, on_map = embedding_map(retrievals, embeddings, list(named))
    report = replace(
        report,
        groups=tuple(group for group in groups if group.cards),
        confusions=confused,
        classes=classes,
        agreement=agreement_table(retrievals, compared),
        agreement_note=f"All shares are of {len(retrievals.queries):,} queries.",
        suspects=tuple(suspicious),
        suspects_note=_suspects_note(num_suspects, num_clear, len(suspicious)),
        map=dots,
        systems=tuple(retrievals.systems),
    )
    uses = Counter(tile.image for tile in _tiles(report))
    uses.update(placed.image for placed in dots.placed)
    limit = int(MAX_PICTURE_BYTES * (1 - MAP_SHARE))
    pictures, num_missing = thumbnails(retrievals.images.source, uses, limit)
    note = ""
    if num_missing:
        note = f"{num_missing:,} of {len(uses):,} images to show cannot be read any more, so they have no picture."
    if pictures:
        used = sum(uses[image] * len(picture.uri) for image, picture in pictures.items())
        places, uris = sheets(retrievals.images.source, on_map.tolist(), MAX_PICTURE_BYTES - used)
        dots = with_sheets(dots, places, uris)
    findings = (*report.findings, *_picture_findings(report, retrievals))
    warnings = (*report.warnings, note) if note else report.warnings
    return replace(report, map=dots, pictures=pictures, pictures_note=note, findings=findings, warnings=warnings)


def _tiles(report: Report) -> Iterator[Tile]:
    """All images that are shown, apart from those on the map."""

    def of_card(card: Card) -> Iterator[Tile]:
        yield card.query
        for found in card.found:
            yield from found.tiles

    for group in report.groups:
        for card in group.cards:
            yield from of_card(card)
    for confusion in report.confusions:
        for pair in confusion.examples:
            yield from pair
    for row in report.classes.rows if report.classes else ():
        yield from row.examples
    for suspect in report.suspects:
        yield suspect.query
        yield from suspect.neighbors
        if suspect.own is not None:
            yield suspect.own


def _result_findings(ended: Sequence[tuple[str, Mapping[str, Any]]], is_one: bool) -> Iterator[Finding]:
    for name, results in ended:
        if not results.get("split"):
            continue
        value = results["ensemble"]["recall@1"]
        interval = results.get("intervals", {}).get("ensemble", {}).get("recall@1")
        around = f" (95 % interval {100 * interval[0]:.1f} – {100 * interval[1]:.1f} %)" if interval else ""
        names = list(results["peers"])
        of = "The ensemble" if len(names) > 1 else names[0]
        text = f"{of} has a Recall@1 of {100 * value:.1f} %{around} on the {results['split']} images."
        if len(names) > 1:
            best = max(names, key=lambda peer: results["peers"][peer]["recall@1"])
            text += f" The best peer, {best}, has {100 * results['peers'][best]['recall@1']:.1f} %."
        yield Finding(text if is_one else f"{name}: {text[0].lower()}{text[1:]}", "results")


def _picture_findings(report: Report, retrievals: Retrievals) -> Iterator[Finding]:
    if report.classes is not None and report.classes.rows:
        worst = report.classes.rows[0]
        recall = worst.recalls[list(retrievals.systems).index(retrievals.main)]
        yield Finding(
            f"The worst class is {worst.name}: {the(retrievals.main)} finds {round(recall * worst.num_queries)} of its "
            f"{worst.num_queries} queries.",
            "classes",
        )
    if report.confusions:
        pair = report.confusions[0]
        yield Finding(
            f"Most confused are {pair.classes[0]} and {pair.classes[1]}, in {sum(pair.counts)} queries.", "confusions"
        )
    for group in report.groups:
        if group.key != "worst":
            yield Finding(f"{group.title}: {group.note.partition(' queries')[0]} queries.", group.key)
    if report.suspects:
        yield Finding(f"{report.suspects_note.partition(':')[0]}.", "suspects")


def _suspects_note(number: int, num_clear: int, shown: int) -> str:
    if not number:
        return ""
    few = f" The {shown} most suspicious are shown." if shown < number else ""
    clear = "1 image is" if num_clear == 1 else f"{num_clear:,} images are" if num_clear else "No image is"
    rest = number - num_clear
    further = "1 further one is" if rest == 1 else f"{rest:,} further ones are"
    unsure = f" {further} nearer to another class than to their own, and mostly hard to tell." if rest else ""
    return (
        f"{clear} probably mislabelled: at least {CLEAR} times as near to another class as to any other image of "
        f"its own, for every peer.{unsure}{few}"
    )


def _warnings(names: Sequence[str], records: Sequence[RunRecord]) -> Iterator[str]:
    for name, record in zip(names, records, strict=True):
        prefix = "" if len(records) == 1 else f"{name}: "
        results = record.results or {}
        texts = [*record.warnings, *results.get("warnings", ()), *results.get("notes", ())]
        if record.results is None:
            texts.append(
                f"The run has not ended: it has made {record.num_steps:,} steps of {record.config.train.steps:,}."
            )
        elif results["split"] is None:
            reason = describe_unevaluated(results)
            texts.append(f"{reason[0].upper()}{reason[1:]}.")
        if record.metrics.num_damaged:
            texts.append(f"{record.metrics.num_damaged} lines of metrics.jsonl cannot be read and are left out.")
        for peer, number in record.metrics.skipped.items():
            texts.append(f"{peer} has left out {number} batches whose values were not finite.")
        for peer, step in results.get("dropped", {}).items():
            texts.append(f"{peer} was lost, and the others went on without it from step {step:,} on.")
        yield from (f"{prefix}{text.removesuffix('.')}." for text in texts)


def _losses_note(records: Sequence[RunRecord]) -> str:
    num_points = max((len(p) for r in records for of in r.metrics.losses.values() for p in of.values()), default=0)
    if num_points <= MAX_POINTS:
        return "One value a step."
    most = -(-num_points // MAX_POINTS)
    return f"A point is the mean of up to {most} steps, and the band is their range."


def _seconds(names: Sequence[str], records: Sequence[RunRecord]) -> tuple[tuple[str, Table], ...]:
    """How long each phase of the runs took, and each phase of the peers' steps."""
    of_runs: dict[str, Mapping[str, float]] = {}
    of_peers: dict[str, Mapping[str, float]] = {}
    for name, record in zip(names, records, strict=True):
        if seconds := (record.results or {}).get("seconds"):
            of_runs[name] = seconds["run"]
            prefix = "" if len(records) == 1 else f"{name}: "
            of_peers |= {f"{prefix}{peer}": phases for peer, phases in seconds["peers"].items()}
    tables = (("Phases of the run", of_runs), ("Steps of each peer", of_peers))
    return tuple((title, _seconds_table(columns)) for title, columns in tables if columns)


def _seconds_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    phases = dict.fromkeys(phase for seconds in columns.values() for phase in seconds)
    rows = tuple(
        Row(phase, tuple(Cell(f"{of[phase]:,.1f}" if phase in of else "-") for of in columns.values()))
        for phase in phases
    )
    total = tuple(Cell(f"{sum(of.values()):,.1f}") for of in columns.values())
    return Table(("seconds", *columns), (*rows, Row("total", total, is_main=True)))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with numbers where two are equal."""
    counts = Counter(names)
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return distinct
