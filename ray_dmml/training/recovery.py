"""What a run does after it lost a peer: one policy and one counter for its start and its training."""

from __future__ import annotations

from enum import Enum

from ray_dmml.config.schema import FailureConfig
from ray_dmml.errors import PeerLostError, UserError


class Decision(Enum):
    """What comes next."""

    RESTART = "restart"
    """New peers take the places of the lost ones, and all go back to the last checkpoint."""

    DROP = "drop"
    """The other peers go back to the last checkpoint and go on without the lost ones."""


class RecoveryPolicy:
    """Decides by ``failure.on_peer_loss`` and ``failure.max_failures``.

    Args:
        config: the ``failure`` section.
        num_peers: size of the cohort. Each peer can be dropped once.
    """

    def __init__(self, config: FailureConfig, num_peers: int) -> None:
        self._config, self._num_peers = config, num_peers
        self.num_failures = 0
        """Failures of this run so far."""

    def decide(self, failure: PeerLostError, checkpoint_step: int | None, *, can_drop: bool) -> Decision:
        """Counts a failure and decides.

        Args:
            failure: which peers were lost, and why.
            checkpoint_step: step of the last checkpoint; None if there is none.
            can_drop: whether the other peers can go on. They cannot if they have not started, or if there is no
                checkpoint: nothing of the dropped peer would be kept.

        Raises:
            UserError: the run ends; the message adds why, and which checkpoint is complete.
        """
        self.num_failures += 1
        allowed = self._config.max_failures
        if self._config.on_peer_loss == "fail":
            raise self._end(failure, "failure.on_peer_loss is fail", checkpoint_step)
        if self.num_failures <= allowed:
            return Decision.RESTART
        if can_drop and self._config.on_peer_loss == "drop" and self.num_failures <= allowed + self._num_peers:
            return Decision.DROP
        reason = f"failure.max_failures is {allowed}, and this is failure {self.num_failures}"
        raise self._end(failure, reason, checkpoint_step)

    def describe(self, decision: Decision) -> str:
        """The decision with its count, for a log line."""
        if decision is Decision.DROP:
            return "the others go on"
        return f"restart {self.num_failures} of {self._config.max_failures}"

    @staticmethod
    def _end(failure: PeerLostError, reason: str, checkpoint_step: int | None) -> UserError:
        kept = "" if checkpoint_step is None else f". The checkpoint of step {checkpoint_step} is complete"
        return UserError(f"{failure}; {reason}{kept}")
