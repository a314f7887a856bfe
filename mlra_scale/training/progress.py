"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass

from mlra_scale.config import BatchPlan


@dataclass(frozen=True)
class Progress:
    """The counters of a run: the only owner of the step count and of the place in the data.

    Attributes:
        step: Steps done; skipped updates count, since their data is used up.
        consumed_samples: Samples used up, over all ranks: where the next step reads on. Those that the guard skips
            count too.
        consumed_tokens: Tokens trained on, over all ranks.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, plan: BatchPlan, place: int | None = None) -> Progress:
        """Returns the counters one step later.

        Args:
            plan: The batch plan.
            place: Where the step read its samples; None: at `consumed_samples`.
        """
        place = self.consumed_samples if place is None else place
        return Progress(self.step + 1, place + plan.global_batch_size, self.consumed_tokens + plan.tokens_per_step)
