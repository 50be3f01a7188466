"""What was run: peers, losses, steps, the machine, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from ray_dmml.config.differences import CHANGES_NO_TRAINING, differing, settings_without
from ray_dmml.config.schema import Config, MutualSection, PeerConfig
from ray_dmml.filesystem import without_secrets
from ray_dmml.report.data import Cell, Described, Row, Table


def describe(
    name: str, path: Path, config: Config, environment: Mapping[str, Any], results: Mapping[str, Any] | None, steps: int
) -> Described:
    """Describes a run.

    Args:
        environment: content of run.json.
        steps: steps that it has made.
    """
    place = quote(str(path))
    commands = [
        ("repeat it", f"ray-dmml train --config {place}/config.yaml"),
        ("evaluate it", f"ray-dmml evaluate {place}"),
    ]
    if results is None:
        commands.append(("continue it", f"ray-dmml train --resume {place}"))
    facts = tuple((what, value) for what, value in _facts(config, environment, results, steps) if value)
    return Described(
        name, str(path), facts, _peers(config.cohort.peers), tuple(commands), without_secrets(config.to_yaml())
    )


def settings_that_differ(names: Sequence[str], configs: Sequence[Config]) -> Table:
    """A row for each setting that is not the same in all runs, without those that change no number."""
    flat = [settings_without(config.model_dump(mode="json"), CHANGES_NO_TRAINING) for config in configs]
    rows = [
        Row(
            key,
            tuple(
                Cell(without_secrets(_short(value)) if key in of else "")
                for of, value in zip(flat, values, strict=True)
            ),
        )
        for key, values in differing(flat).items()
    ]
    return Table(("setting", *names), tuple(rows))


def _facts(
    config: Config, environment: Mapping[str, Any], results: Mapping[str, Any] | None, steps: int
) -> Iterator[tuple[str, str]]:
    data, train = config.data, config.train
    yield "images", data.name if data.root is None else f"{data.name}: {data.manifest or data.root}"
    yield "batches", f"{data.classes_per_batch} classes x {data.images_per_class} images"
    of = f"{steps:,} of {train.steps:,}" if steps < train.steps else f"{steps:,}"
    per_epoch = environment.get("steps_per_epoch")
    notes = [f"{steps / per_epoch:.1f} epochs"] if per_epoch else []
    notes += ["stopped early"] if (results or {}).get("stopped_early") else []
    yield "steps", f"{of} ({', '.join(notes)})" if notes else of
    metric = config.loss.metric
    miner = f", {metric.miner.name}" if metric.miner else ""
    yield "metric loss", f"{metric.name}({_arguments(metric.args)}){miner}"
    yield "mutual loss", ", ".join(_mutual(config)) or "none: the peers learn alone"
    yield "starts from", str(train.init_from or "")
    yield "seed", f"{config.seed} (run), {', '.join(str(peer.seed) for peer in config.cohort.peers)} (peers)"
    if results is not None and results.get("step") is not None:
        yield "evaluated weights", f"{results['weights']}, of step {results['step']:,}"
        yield "speed", f"{results['images_per_second']:,.0f} images/s" if "images_per_second" in results else ""
    yield "skipped images", str(len(environment.get("skipped_images", ())) or "")
    nodes, devices = set(environment.get("nodes") or ()), environment.get("devices") or ()
    where = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
    yield "devices", ", ".join(dict.fromkeys(devices)) + where
    yield "torch threads", ", ".join(map(str, environment.get("threads") or ()))
    yield "exchange", str(environment.get("transport", ""))
    cpu, cores = environment.get("cpu"), environment.get("cores")
    yield "machine", ", ".join(filter(None, (cpu, cores and f"{cores} cores", environment.get("machine"))))
    yield "commit", str(environment.get("commit") or "")[:12]
    versions = {"python": environment.get("python"), **environment.get("versions", {})}
    yield "versions", ", ".join(f"{package}\u00a0{version}" for package, version in versions.items() if version)


def _mutual(config: Config) -> Iterator[str]:
    loss = config.loss
    sections: list[tuple[str, float, MutualSection]] = [
        ("distance", loss.relational.distance_weight, loss.relational),
        ("angle", loss.relational.angle_weight, loss.relational),
        ("similarity", loss.similarity.weight, loss.similarity),
        ("relaxed contrastive", loss.relaxed_contrastive.weight, loss.relaxed_contrastive),
        *((str(term.label), term.weight, term) for term in loss.mutual),
    ]
    if len(config.cohort.peers) < 2:
        return
    for name, weight, section in sections:
        if weight:
            teacher = "" if section.teacher == "each" else f", from {section.teacher}"
            yield f"{name} x {weight:g}{teacher}"


def _peers(peers: Sequence[PeerConfig]) -> Table:
    rows = []
    for peer in peers:
        view = peer.view if isinstance(peer.view, str) else ", ".join(_transform(part) for part in peer.view)
        every = (
            "frozen" if peer.frozen else "each step" if peer.update_interval == 1 else f"{peer.update_interval} steps"
        )
        if peer.update_mode == "skip" and peer.update_interval > 1:
            every += " (skip)"
        optimizer = "" if peer.frozen else f"{peer.optimizer.name}, lr {peer.optimizer.lr:g}"
        if peer.optimizer.clip_norm and not peer.frozen:
            optimizer += f", clip {peer.optimizer.clip_norm:g}"
        schedule = "" if peer.frozen or peer.schedule.name == "constant" else peer.schedule.name
        cells = (peer.backbone, peer.weights, str(peer.embedding_size), view or "as decoded", every, optimizer)
        rows.append(
            Row(
                str(peer.name), tuple(Cell(text, note) for text, note in zip(cells, (*[""] * 5, schedule), strict=True))
            )
        )
    return Table(("peer", "backbone", "initial weights", "size", "view", "updated every", "optimiser"), tuple(rows))


def _transform(part: Any) -> str:
    return f"{part.name}({_arguments(part.args)})"


def _arguments(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in args.items())


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
