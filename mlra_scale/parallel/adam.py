"""The state of either Adam: torch's fused AdamW or DeepSpeed's CPUAdam (offload).

Both create it at the first update, in `optimizer.state`, by the tensor that is updated: two moments of that tensor's
shape and the number of updates. The momentum of muon and spectron lies there too, as the first moment of tensors that
have no second one and no number of updates.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


class AdamState:
    """The state of one rank's Adam, and the momentum of its other optimizers.

    Args:
        optimizer: torch's AdamW or DeepSpeedCPUAdam, without DeepSpeed's wrapper.
        masters: The fp32 tensors of all parameter groups.
        groups: The parameter group of each of them.
    """

    def __init__(self, optimizer: Any, masters: Sequence[torch.Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
        self.optimizer = optimizer
        self.masters = masters
        self._is_adamw = [group["is_adamw"] for group in groups]
        self._counts = [group["begun_at"] for group in groups]

    def of(self, master: torch.Tensor) -> Mapping[str, Any]:
        """Returns the state of one tensor; empty before the first update."""
        return self.optimizer.state.get(master, {})

    def step(self) -> int:
        """Returns the number of updates that the moments have seen, the largest of all tensors."""
        steps = [self.of(master).get("step", 0) for master, _ in self._masters_of_adam()]
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
        for master, is_adamw in zip(self.masters, self._is_adamw, strict=True):
            state = {"exp_avg": None} if is_adamw else self.optimizer.state[master]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(master, requires_grad=False)

    def set_step(self, step: int, begun: Mapping[int, int]) -> None:
        """Sets the number of updates that the moments have seen; moments must exist, unless it is zero.

        Args:
            step: Updates of the run.
            begun: By the `begun_at` of a group: after how many of them its moments began; others began with the run.
        """
        starts = []
        for master, count in self._masters_of_adam():
            starts.append(begun.get(count, 0))
            if state := self.optimizer.state.get(master):
                is_tensor = torch.is_tensor(state["step"])
                seen = step - starts[-1]
                state["step"] = torch.full_like(state["step"], seen) if is_tensor else seen
        if not isinstance(self.optimizer, torch.optim.AdamW):
            self._replay_powers(step, starts)

    def _masters_of_adam(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The tensors that AdamW updates, each with the `begun_at` of its group."""
        for master, is_adamw, count in zip(self.masters, self._is_adamw, self._counts, strict=True):
            if is_adamw:
                yield master, count

    def forget(self) -> None:
        """Puts the optimizer back to before its first update."""
        self.optimizer.state.clear()
        self.set_step(0, {})

    def _replay_powers(self, step: int, starts: Sequence[int]) -> None:
        """Gives CPUAdam the powers of beta that it has after `step` updates.

        CPUAdam multiplies them in fp32, update by update, and uses `pow` where a step does not follow the one before.
        `pow` differs in the last digit: a resumed run would not continue bitwise.

        Args:
            step: Updates of the run.
            starts: After how many of them the moments of each tensor began, in the order in which they are updated.
        """
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        dummies = [torch.zeros(1) for _ in range(4)]
        changes = [start for index, start in enumerate(starts) if index == 0 or start != starts[index - 1]]
        seen = [update - start for update in range(1, step + 1) for start in changes if update > start]
        for count in (0, *seen):  # 0 puts both powers back to one
            self.optimizer.ds_opt_adam.adam_update(
                self.optimizer.opt_id, count, 0.0, beta1, beta2, 1.0, 0.0, group["bias_correction"], *dummies
            )
