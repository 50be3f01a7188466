"""What a run does after it lost a peer, for every setting and every count of failures."""

from __future__ import annotations

import pytest

from ray_dmml.config.schema import FailureConfig
from ray_dmml.errors import PeerLostError, UserError
from ray_dmml.training.recovery import Decision, RecoveryPolicy

LOST = PeerLostError("peer1 died", stuck=("peer1",))


def policy(num_peers: int = 3, **settings: object) -> RecoveryPolicy:
    return RecoveryPolicy(FailureConfig.model_validate(settings), num_peers)


def test_restart_until_the_failures_are_used_up() -> None:
    """The count is one for failures with and without a checkpoint."""
    restart = policy(max_failures=2)
    assert restart.decide(LOST, None, can_drop=False) is Decision.RESTART
    assert restart.describe(Decision.RESTART) == "restart 1 of 2"
    assert restart.decide(LOST, 4, can_drop=True) is Decision.RESTART
    with pytest.raises(UserError, match=r"peer1 died; failure\.max_failures is 2.*step 4 is complete") as ended:
        restart.decide(LOST, 4, can_drop=True)
    assert not isinstance(ended.value, PeerLostError)
    assert restart.num_failures == 3


def test_fail_ends_the_run_at_once() -> None:
    with pytest.raises(UserError, match=r"peer1 died; failure\.on_peer_loss is fail$") as ended:
        policy(on_peer_loss="fail").decide(LOST, None, can_drop=False)
    # The loop restarts after a PeerLostError.
    assert not isinstance(ended.value, PeerLostError)


def test_drop_comes_after_the_restarts_and_once_for_each_peer() -> None:
    drop = policy(num_peers=2, on_peer_loss="drop", max_failures=1)
    decisions = [drop.decide(LOST, 4, can_drop=True) for _ in range(3)]
    assert decisions == [Decision.RESTART, Decision.DROP, Decision.DROP]
    with pytest.raises(UserError, match="max_failures is 1, and this is failure 4"):
        drop.decide(LOST, 4, can_drop=True)


def test_nothing_is_dropped_without_a_checkpoint() -> None:
    """Nothing of the lost peer would be kept."""
    with pytest.raises(UserError, match="max_failures is 0"):
        policy(on_peer_loss="drop", max_failures=0).decide(LOST, None, can_drop=False)


def test_peers_that_have_not_started_are_not_dropped() -> None:
    """Though there is a checkpoint: the run that was to go on from it ends after its restarts."""
    drop = policy(on_peer_loss="drop", max_failures=1)
    assert drop.decide(LOST, 4, can_drop=False) is Decision.RESTART
    with pytest.raises(UserError, match=r"max_failures is 1.*step 4 is complete"):
        drop.decide(LOST, 4, can_drop=False)
