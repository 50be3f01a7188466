"""What the readers of a data set find wrong (faults) or want to say (notes)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_dmml.errors import UserError


@dataclass
class Findings:
    """Collects the notes of a data set, and raises its first fault, or collects the faults, too.

    Attributes:
        collects_faults: a fault is appended to ``faults``. A reader then goes on without what is wrong. False: a fault
            raises UserError.
        faults: why a run would refuse the data set, each a sentence.
        notes: what a user should know of it, each a sentence.
    """

    collects_faults: bool = False
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fault(self, message: str) -> None:
        """Raises UserError unless faults are collected."""
        if not self.collects_faults:
            raise UserError(message)
        self.faults.append(message)

    def note(self, message: str) -> None:
        self.notes.append(message)
