"""Stops a run whose loss or gradient norm is not finite, which DeepSpeed would skip for ever.

All ranks stop after the same step, since they decide from the same all-reduced values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlra_scale.config import TrainConfig
from mlra_scale.stability.watcher import Step, Watcher
from mlra_scale.training.exit_codes import TrainingStopped

if TYPE_CHECKING:
    from mlra_scale.parallel.interface import StepResult, UpdateProposal


class FiniteCheck(Watcher):
    """Refuses updates that are not finite, and ends the run after one.

    In fp16 an overflow is normal: the loss scale is lowered and the update skipped. Only a long row of them is a fault.

    Args:
        train: Precision, and the number of overflows that is too many.
        ends_run: False where the guard decides what follows such an update, which is refused all the same.
    """

    name = "finite"

    def __init__(self, train: TrainConfig, ends_run: bool = True) -> None:
        self._is_fp16, self._max_overflows = train.precision == "fp16", train.max_consecutive_overflows
        self._ends_run = ends_run
        self._overflows = 0

    def before_update(self, proposal: UpdateProposal) -> bool:
        return self._is_fp16 or proposal.is_finite

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        """Counts overflows.

        Raises:
            TrainingStopped: Not finite in bf16 or fp32, or too many overflows in a row in fp16.
        """
        is_finite = math.isfinite(result.loss) and math.isfinite(result.gradient_norm)
        fault = None
        if self._is_fp16:
            self._overflows = self._overflows + 1 if result.overflow else 0
            if (row := self.overflow_fault()) is not None:
                fault = (
                    f"{row} (loss scale {result.loss_scale}). The activations or gradients do not fit fp16: lower "
                    "optim.lr or use train.precision=bf16. train.max_consecutive_overflows sets the limit."
                )
        elif not is_finite:
            fault = (
                "this is not finite. The update was not applied and the run stops on all ranks. Look at the loss, "
                "gradient norm and TEV of the steps before in metrics.jsonl: if they grow, lower optim.lr, lengthen "
                "optim.warmup_steps or lower optim.grad_clip; if they do not, look at the data of this step. Continue "
                "from the last checkpoint with --resume auto."
            )
        if fault is None or not self._ends_run:
            return {}
        numbers = f"loss {result.loss}, gradient norm {result.gradient_norm}"
        values = {
            "step": step.number,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "loss_scale": result.loss_scale,
            "consumed_samples": step.first_sample,
        }
        raise TrainingStopped(f"step {step.number} (samples from {step.first_sample}): {numbers}; {fault}", values)

    def overflow_fault(self) -> str | None:
        """Returns why the present row of overflows is too long; None: it is not."""
        if self._overflows < self._max_overflows:
            return None
        return f"{self._overflows} loss-scale overflows in a row"

    def state(self) -> dict[str, int]:
        return {"overflows": self._overflows}

    def load_state(self, state: Mapping[str, int]) -> None:
        self._overflows = state["overflows"]
