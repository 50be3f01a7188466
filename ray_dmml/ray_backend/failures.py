"""What Ray raises about actors, as one error with a message for the user."""

from __future__ import annotations

from collections.abc import Mapping

from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_dmml.errors import ExchangeLostError, NonFiniteTeacherError, PeerLostError, UserError


def cause_of(error: Exception) -> Exception:
    """What was raised inside an actor, without Ray's wrapping."""
    return getattr(error, "cause", None) or error


def is_death(error: Exception) -> bool:
    """Whether an actor itself died. A living actor whose call on a dead one failed raises a RayTaskError,
    which is a RayActorError, too; the dead one is then the coordinator."""
    return isinstance(error, RayActorError) and not isinstance(error, RayTaskError)


def is_user_mistake(error: Exception) -> bool:
    """Whether a setting or a file is wrong, so that trying again does not help."""
    return isinstance(error, UserError) and not isinstance(error, PeerLostError)


def is_own_cause(error: Exception) -> bool:
    """Whether it is a user's mistake that no failure of another peer has caused."""
    return is_user_mistake(error) and not isinstance(error, NonFiniteTeacherError)


def first_cause(failures: Mapping[str, Exception], num_sent: Mapping[str, int]) -> Exception:
    """The failure that caused the others: a user's mistake, then a death, then a lost exchange.

    Args:
        failures: what the calls of peers raised, by name.
        num_sent: number of steps whose embeddings each peer has sent, by name.
    """
    causes = [cause_of(failure) for failure in failures.values()]
    for cause in sorted(causes, key=is_own_cause, reverse=True):
        if is_user_mistake(cause):
            return cause
    deaths = {name: reason_of(failure) for name, failure in failures.items() if is_death(failure)}
    if deaths:
        steps = {name: f" in step {num_sent[name]}" if num_sent.get(name) else "" for name in deaths}
        return PeerLostError("; ".join(f"{name} died{steps[name]}: {reason}" for name, reason in deaths.items()))
    for cause in causes:
        if isinstance(cause, RayActorError):
            return PeerLostError(f"the coordinator died: {reason_of(cause)}")
    # Every other failure looks like a lost exchange to the other peers, so that is believed last.
    cause = min(causes, key=lambda c: (isinstance(c, PeerLostError), isinstance(c, ExchangeLostError)))
    return PeerLostError(reason_of(cause)) if isinstance(cause, RayError) else cause


def reason_of(error: Exception) -> str:
    """Why an actor died, in a few words out of Ray's paragraph."""
    text = str(error)
    if "OUT_OF_MEMORY" in text or "running low on memory" in text:
        return "out of memory: Ray ended it because its node had too little left"
    if "node has died" in text or "NODE_DIED" in text:
        return "its node was lost"
    if "unavailable" in text:
        return "it does not answer"
    if "ray.kill" in text:
        return "it was ended"
    if "SYSTEM_ERROR" in text or "connection error" in text.lower():
        return "its process was killed or crashed"
    return first_line(error)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
