"""What the readers of a data set find wrong (faults) or want to say (notes)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ray_dmml.data.dataset import ImageSet
from ray_dmml.errors import UserError

FEW_CLASSES, FEW_QUERIES = 10, 200
"""Below one of them, validation figures say little."""


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


def notes_on_validation(images: ImageSet | None) -> Iterator[str]:
    """Says that the validation images are few, if they are."""
    if images is None:
        return
    num_classes, num_queries = images.num_classes, images.num_evaluated()
    if num_classes < FEW_CLASSES or num_queries < FEW_QUERIES:
        yield (
            f"validation Recall@1 is coarse: it is of {num_classes} classes and {num_queries} queries, and one query "
            f"is {100 / max(1, num_queries):.2g} points. Small differences mean nothing; more classes, or a higher "
            "data.validation_fraction, make it finer"
        )
