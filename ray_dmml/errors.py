"""Errors a user can act on.

The command line prints the message of a :class:`UserError` on its own, without a traceback, and
exits with a non-zero code. Everything else is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in a setting, a file or the set-up: the message says what, where, and what is allowed."""


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; the message names the peer, the step and the term."""


class PeerLostError(UserError):
    """A peer (or the coordinator) died or fell silent; the message names it and the step."""
