"""Which peer is silent, which one hangs, and when the driver itself was stopped."""

from __future__ import annotations

import time

import pytest

from ray_dmml.config.schema import FailureConfig
from ray_dmml.errors import PeerLostError
from ray_dmml.ray_backend.coordinator import PeerStatus
from ray_dmml.ray_backend.failure_detector import LONGEST_CHECK_INTERVAL_S, FailureDetector


def test_the_time_in_which_the_driver_was_stopped_counts_for_nobody() -> None:
    config = FailureConfig(node_timeout_s=1e9)
    detector = FailureDetector(1.5 * LONGEST_CHECK_INTERVAL_S, config, {})
    statuses = {"peer0": PeerStatus(num_sent=1, num_chunks=0, silent_s=0.5)}
    now = time.monotonic()
    detector.check(statuses, statuses, now=now)
    now += 3600.0
    detector.check(statuses, statuses, now=now)
    now += LONGEST_CHECK_INTERVAL_S
    with pytest.raises(PeerLostError, match="peer0: no progress for 9 s"):
        detector.check(statuses, statuses, now=now)


def test_a_silent_coordinator_is_lost_after_the_heartbeat_timeout() -> None:
    detector = FailureDetector(100, FailureConfig(heartbeat_timeout_s=5), {})
    now = time.monotonic()
    detector.check(["peer0"], {}, now=now)
    with pytest.raises(PeerLostError, match="the coordinator gave no answer for 5 s"):
        detector.check(["peer0"], {}, now=now + LONGEST_CHECK_INTERVAL_S)


def failure(patience: float, **statuses: PeerStatus) -> PeerLostError | None:
    """What two checks with a long pause between them raise."""
    config = FailureConfig(node_timeout_s=1e9, heartbeat_timeout_s=60)
    detector = FailureDetector(patience, config, {})
    now = time.monotonic()
    try:
        detector.check(statuses, statuses, now=now)
        detector.check(statuses, statuses, now=now + LONGEST_CHECK_INTERVAL_S)
    except PeerLostError as error:
        return error
    return None


WAITS, AHEAD = PeerStatus(7, 0, 0.5), PeerStatus(8, 0, 0.5)


def test_a_stopped_peer_is_known_by_its_missing_heartbeats() -> None:
    lost = failure(100, a=WAITS, b=PeerStatus(7, 0, 61.0), c=WAITS)
    assert lost is not None and lost.stuck == ("b",) and lost.suspects == ()
    assert failure(3, a=WAITS, b=PeerStatus(7, 0, 30.0), c=WAITS) is None  # soon it is known


def test_a_hanging_peer_is_the_one_that_got_least_far() -> None:
    """If several got equally far, all of them are suspects."""
    lost = failure(3, a=AHEAD, b=WAITS, c=AHEAD)
    assert lost is not None and lost.stuck == ("b",)
    lost = failure(3, a=WAITS, b=WAITS, c=AHEAD)
    assert lost is not None and lost.stuck == () and lost.suspects == ("a", "b")
    assert failure(3, a=WAITS) is not None and failure(100, a=WAITS) is None
