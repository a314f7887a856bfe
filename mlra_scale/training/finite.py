"""Stopping on a loss or a gradient norm that is no number.

DeepSpeed skips such an update and goes on, for ever; here the run ends, or the guard takes it back, on all ranks on the
same step, because every rank decides from the same all-reduced values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlra_scale.config import TrainConfig
from mlra_scale.training.exit_codes import ExitCode

if TYPE_CHECKING:
    # Importing an engine imports DeepSpeed, and the check itself needs only numbers.
    from mlra_scale.parallel.interface import StepResult, UpdateProposal


class TrainingStopped(RuntimeError):
    """The run cannot go on; its text says why and what to look at.

    Attributes:
        values: The step and its numbers, for the event log.
        exit_code: How the process ends.
    """

    def __init__(
        self, message: str, values: Mapping[str, float | int | str | None], exit_code: ExitCode = ExitCode.NON_FINITE
    ) -> None:
        super().__init__(message)
        self.values = values
        self.exit_code = exit_code


class FiniteCheck:
    """Keeps updates that are no numbers from being applied, and says when to stop.

    In fp16 an overflow is normal: the dynamic loss scale shrinks and the update is skipped. Only a long row of them is
    an error.
    """

    def __init__(self, train: TrainConfig, is_guarded: bool = False) -> None:
        """Makes a check.

        Args:
            train: Precision, and the number of overflows that is too many.
            is_guarded: Whether the guard looks after what is not finite, too many overflows included; such an update is
                still never applied.
        """
        self._is_fp16, self._is_guarded = train.precision == "fp16", is_guarded
        self._max_overflows = train.max_consecutive_overflows
        self._overflows = 0

    def state(self) -> dict[str, int]:
        """Returns what a checkpoint keeps of it."""
        return {"overflows": self._overflows}

    def load(self, state: Mapping[str, int]) -> None:
        """Goes on from what `state` returned."""
        self._overflows = state["overflows"]

    @property
    def too_many_overflows(self) -> str | None:
        """Says of a row of overflows that it is too long; None: it is not."""
        if self._overflows < self._max_overflows:
            return None
        return f"{self._overflows} loss-scale overflows in a row"

    def approve(self, proposal: UpdateProposal) -> bool:
        """Returns whether the update may be applied; the same on every rank, as the proposal is."""
        return self._is_fp16 or (math.isfinite(proposal.loss) and math.isfinite(proposal.gradient_norm))

    def check(self, step: int, result: StepResult, consumed_samples: int) -> None:
        """Raises when the run has to stop.

        Args:
            step: The step that `result` is of.
            result: What the engine reported, identical on all ranks.
            consumed_samples: Samples read before this step, to find its data again.

        Raises:
            TrainingStopped: Not finite in bf16 or fp32, or too many overflows in a row in fp16; never with a guard.
        """
        shown = (
            f"step {step} (samples from {consumed_samples}): loss {result.loss}, gradient norm {result.gradient_norm}"
        )
        values = {
            "step": step,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "loss_scale": result.loss_scale,
            "consumed_samples": consumed_samples,
        }
        if self._is_fp16:
            self._overflows = self._overflows + 1 if result.overflow else 0
            if not self._is_guarded and self.too_many_overflows is not None:
                raise TrainingStopped(
                    f"{shown}; {self.too_many_overflows} (loss scale {result.loss_scale}). "
                    "The activations or gradients do not fit fp16: lower optim.lr or use train.precision=bf16. "
                    "train.max_consecutive_overflows sets the limit.",
                    values,
                )
            return
        if self._is_guarded or (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            return
        raise TrainingStopped(
            f"{shown}; this is not finite. The update was not applied and the run stops on all ranks. Look at the "
            "loss, gradient norm and TEV of the steps before in metrics.jsonl: if they grow, lower optim.lr, lengthen "
            "optim.warmup_steps or lower optim.grad_clip; if they do not, look at the data of this step. Continue "
            "from the last checkpoint with --resume auto.",
            values,
        )
