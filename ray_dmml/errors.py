"""Errors that a user can act on.

The command line prints the message of a :class:`UserError` without a traceback and exits with a non-zero code. Any
other exception is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """A setting, a file or the environment is wrong. The message says what, where, and what is allowed."""


class NonFiniteLossError(UserError):
    """A loss is NaN or infinite. The message names the peer, the step and the term."""


class NonFiniteTeacherError(NonFiniteLossError):
    """A loss is NaN or infinite because embeddings of another peer are. That peer raises a NonFiniteLossError."""


class PeerLostError(UserError):
    """A peer, the coordinator or a node has died or hangs, or its data arrived damaged. The cohort can recover.

    Args:
        message: the message for the user, which names what was lost.
        stuck: names of peers that hang. Their processes may still exist and have to be killed.
        suspects: names of peers of which one hangs, while the others may only wait for it. They have to be killed too.
    """

    def __init__(self, message: str, stuck: tuple[str, ...] = (), suspects: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.stuck, self.suspects = stuck, suspects


class ExchangeLostError(PeerLostError):
    """Another peer no longer takes part in the exchange. A peer sees a failure elsewhere as this error."""


class ReplicaLostError(PeerLostError):
    """A process that shares the batches of a peer has died. The peer has to be restarted."""


class WorkerLostError(PeerLostError):
    """A process that makes the views of a peer has died. The peer has to be restarted."""


class Interrupted(Exception):
    """The run was asked to stop and has stopped. Its last checkpoint is of the step at which it stopped."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or the stop button of a notebook, has stopped a run. The message is how to continue it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows. Where the run was when it stopped says nothing to its user."""
        return [f"KeyboardInterrupt: {self}"]


class CheckpointError(UserError):
    """A checkpoint cannot be written or copied to the storage. Earlier checkpoints are intact."""


def first_fault(error: ValidationError) -> str:
    """The first fault of a file or request that pydantic has refused: where it is, and what is allowed."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])
