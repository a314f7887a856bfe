"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass

from mlra_scale.config import BatchPlan


@dataclass(frozen=True)
class Progress:
    """The counters of a run: the only owner of the step count and of the place in the data.

    Attributes:
        step: Steps done; skipped updates count, since their data is used up.
        consumed_samples: Samples read, over all ranks.
        consumed_tokens: Tokens read, over all ranks.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, plan: BatchPlan) -> Progress:
        """Returns the counters one step later."""
        return Progress(
            self.step + 1, self.consumed_samples + plan.global_batch_size, self.consumed_tokens + plan.tokens_per_step
        )
