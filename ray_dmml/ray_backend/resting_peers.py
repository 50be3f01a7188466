"""Processes of peers between two runs of one trial process: they have imported everything, and rest in their places.

A trial of a search has one placement group for all its runs, and Ray Tune gives the trial's process, with the group, to
the next trial that needs the same. So its peers need not start again, which takes longer than a short trial.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError

REST_S = 5.0
"""Seconds in which a peer must answer that it rests. Otherwise it is ended."""

Place = tuple[str, int, type]
"""ID of the placement group, number of the bundle, class of the actor."""

_resting: dict[Place, Any] = {}


def take(place: Place) -> Any | None:
    """The actor that rests in a place, which rests no more; None if there is none."""
    return _resting.pop(place, None)


def rest(actors: dict[Place, Any]) -> None:
    """Lets actors that have nothing more to do rest in their places. Those that cannot are ended."""
    refs = {place: actor.rest.remote() for place, actor in actors.items()}
    ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=REST_S) if refs else ([], [])
    for place, actor in actors.items():
        try:
            can_rest = refs[place] in ready and ray.get(refs[place])
        except RayError:  # it is gone, or its call failed
            can_rest = False
        if can_rest:
            _resting[place] = actor
        else:
            ray.kill(actor)
