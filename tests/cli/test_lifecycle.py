"""When a signal is outlived, and what is kept then. What ends a process is in test_signals.py."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from ray_dmml import interruption
from ray_dmml.cli.lifecycle import Interruptible
from ray_dmml.errors import Interrupted
from ray_dmml.loggers.output import Console


@pytest.mark.parametrize(
    ("metrics", "message"),
    [({"checkpoint": "last", "is_last": True}, "stopped at step 4"), ({"lost": "peer1 died"}, "peers were lost")],
)
def test_a_signal_of_the_last_step_ends_the_run(
    metrics: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last checkpoint, wherever early stopping put it, and when a peer was lost: no step follows for long."""
    signals = Interruptible(Console())
    signals.log(metrics, 4)
    monkeypatch.setattr(interruption, "received", lambda: signal.SIGINT)
    signals.log({"checkpoint": "last", "is_last": False}, 4)
    with pytest.raises(Interrupted, match=message):
        signals.log(metrics, 4)
