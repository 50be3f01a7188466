"""Check of a config: whether its peers have room on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ray_dmml.config.schema import Config
from ray_dmml.doctor.check import Check
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.placement import num_workers_of, plan, threads_of
from ray_dmml.training.quick_check import check_quickly


def fits(config: Config, resources: Mapping[str, float]) -> Check:
    """What each peer would get of this machine.

    Args:
        resources: of this machine, such as ``{"CPU": 8, "GPU": 1}``.
    """
    try:
        check_quickly(config, on_this_machine=True)
        bundles = plan(config, [resources], [])
    except UserError as error:
        return Check(name="config", state="problem", message=str(error))
    facts, texts = {}, Counter[str]()
    for peer, bundle in zip(config.cohort.peers, bundles, strict=True):
        workers, threads = num_workers_of(peer, bundle), threads_of(peer, bundle)
        facts[str(peer.name)] = {**bundle, "view_workers": workers, "threads": threads}
        amounts = ", ".join(f"{amount:.3g} {kind}" for kind, amount in bundle.items())
        texts[f"{amounts}, {threads} torch threads, {workers} view workers"] += 1
    peers = "; ".join(f"{number} with {text}" if len(texts) > 1 else f"each {text}" for text, number in texts.items())
    message = f"{len(bundles)} peers have room: {peers}"
    if bundles[0]["CPU"] < 1:
        advice = "Peers share cores: train fewer of them, or on a machine with as many cores as peers."
        return Check(name="config", state="note", message=message, advice=advice, facts=facts)
    return Check(name="config", state="ok", message=message, facts=facts)
