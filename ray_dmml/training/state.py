"""What the training loop carries over an interruption; the peers' own states are in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray_dmml.checkpoint.store import Checkpoint
from ray_dmml.config.schema import Config
from ray_dmml.evaluation.evaluation import Figures

_IN_META = ("best", "best_step", "num_since_best", "untrained", "dropped")


@dataclass
class TrainingState:
    """Progress of a run. Every field is a function of the step, so it returns to a checkpoint with the peers."""

    step: int = 0
    """Finished steps."""

    best: float = -1.0
    """The best validation Recall@1 so far."""

    best_step: int = 0
    num_since_best: int = 0
    """Evaluations since the best one."""

    untrained: Figures = field(default_factory=dict)
    """Figures of the untrained peers on the classes of the final evaluation."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Peers that the others go on without, and since which step."""

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> TrainingState:
        """The state that a checkpoint holds."""
        if checkpoint is None:
            return cls()
        meta = {key: checkpoint.meta[key] for key in _IN_META}
        return cls(checkpoint.step, **{**meta, "dropped": dict(meta["dropped"])})

    def meta(self, config: Config) -> dict[str, Any]:
        """What a checkpoint stores of the run, beside the peers."""
        return {"config": config.model_dump(mode="json"), **{key: getattr(self, key) for key in _IN_META}}

    def take(self, value: float) -> bool:
        """Takes the validation Recall@1 of this step; whether it is the best so far."""
        if value > self.best:
            self.best, self.best_step, self.num_since_best = value, self.step, 0
            return True
        self.num_since_best += 1
        return False

    def is_over(self, config: Config) -> bool:
        """Whether the run has reached its last step, or no evaluation was better for as long as early stopping
        waits."""
        patience = config.train.early_stopping
        return self.step >= config.train.steps or (patience is not None and self.num_since_best >= patience)
