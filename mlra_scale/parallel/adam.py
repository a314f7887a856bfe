"""The state of either Adam: torch's fused AdamW or DeepSpeed's CPUAdam (offload).

Both create it at the first update, in `optimizer.state`, by the tensor that is updated: two moments of that tensor's
shape and the number of updates. The momentum of muon and spectron lies there too, as the first moment of tensors that
have no second one and no number of updates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class AdamState:
    """The state of one rank's Adam, and the momentum of its other optimizers.

    Args:
        optimizer: torch's AdamW or DeepSpeedCPUAdam, without DeepSpeed's wrapper.
        masters: The fp32 tensors of all parameter groups.
        has_momentum_only: Which of them muon or spectron updates.
    """

    def __init__(self, optimizer: Any, masters: Sequence[torch.Tensor], has_momentum_only: Sequence[bool]) -> None:
        self.optimizer = optimizer
        self.masters = masters
        self._has_momentum_only = has_momentum_only

    def of(self, master: torch.Tensor) -> Mapping[str, Any]:
        """Returns the state of one tensor; empty before the first update."""
        return self.optimizer.state.get(master, {})

    def step(self) -> int:
        """Returns the number of updates that the moments have seen, the largest of all tensors."""
        steps = [self.of(master).get("step", 0) for master in self.masters]
        if all(torch.is_tensor(step) for step in steps):
            return int(torch.stack(steps).max())  # one read of the device for all tensors
        return max(int(step) for step in steps)

    def create(self) -> None:
        """Creates the missing state with the values that it has right before the first update."""
        has_tensor_step = isinstance(self.optimizer, torch.optim.AdamW)
        self.create_momentum()
        for master in self.masters:
            state = self.optimizer.state[master]
            if "exp_avg" not in state:
                zero = torch.zeros((), dtype=torch.float32, device=master.device)
                state["step"] = zero if has_tensor_step else 0
                state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)

    def create_momentum(self) -> None:
        """Creates the missing momentum of muon and spectron."""
        for master, is_without_more in zip(self.masters, self._has_momentum_only, strict=True):
            state = self.optimizer.state[master] if is_without_more else {"exp_avg": None}
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(master, requires_grad=False)

    def set_step(self, step: int) -> None:
        """Sets the number of updates that the moments have seen; moments must exist, unless it is zero."""
        for master in self.masters:
            state = self.optimizer.state.get(master, {})
            if "step" in state:
                is_tensor = torch.is_tensor(state["step"])
                state["step"] = torch.full_like(state["step"], step) if is_tensor else step
        if not isinstance(self.optimizer, torch.optim.AdamW):
            self._replay_powers(step)

    def forget(self) -> None:
        """Puts the optimizer back to before its first update."""
        self.optimizer.state.clear()
        self.set_step(0)

    def _replay_powers(self, step: int) -> None:
        """Gives CPUAdam the powers of beta that it has after `step` updates.

        CPUAdam multiplies them in fp32, update by update, and uses `pow` where a step does not follow the one before.
        `pow` differs in the last digit: a resumed run would not continue bitwise.
        """
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        dummies = [torch.zeros(1) for _ in range(4)]
        for count in range(step + 1):  # step 0 puts both powers back to one
            self.optimizer.ds_opt_adam.adam_update(
                self.optimizer.opt_id, count, 0.0, beta1, beta2, 1.0, 0.0, group["bias_correction"], *dummies
            )
