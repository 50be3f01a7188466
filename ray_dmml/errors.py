"""Errors a user can act on.

The command line prints the message of a :class:`UserError` on its own, without a traceback, and
exits with a non-zero code. Everything else is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in a setting, a file or the set-up: the message says what, where, and what is allowed."""


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; the message names the peer, the step and the term."""


class PeerLostError(UserError):
    """A peer (or the coordinator, or a node) died or fell silent, or what it sent arrived damaged; the
    message names it. The cohort can recover from it.

    Args:
        message: for the user.
        stuck: names of peers whose processes may live and are to be ended.
        suspects: names of peers that are to be ended, too, of whom one is stuck and the others may only
            wait for it.
    """

    def __init__(
        self, message: str, stuck: tuple[str, ...] = (), suspects: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.stuck, self.suspects = stuck, suspects


class ExchangeLostError(PeerLostError):
    """Another peer is gone from the exchange: what a death or a fault elsewhere looks like from here."""


class ReplicaLostError(PeerLostError):
    """One of the processes that share a peer's batches is gone, and the peer is to be started anew."""


class StartLostError(PeerLostError):
    """A peer was lost before there was a checkpoint: all must be built anew."""


class Interrupted(Exception):
    """The run was asked to stop, and has: its last checkpoint is of the step it stopped at."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or copied to the storage; what was there before is whole."""
