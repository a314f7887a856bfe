"""What steps take beside what the planner expected of them, in one line after some steps of a start."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch

from mlra_scale.config import BatchPlan, Config
from mlra_scale.planning.step_time import step_time
from mlra_scale.training.launch import devices_here
from mlra_scale.training.layout import cluster_for

FIRST, LAST = 6, 20
"""Steps of this start whose time counts, but for those with measurements; the first ones compile and fill caches."""
TOLERANCE = 0.25


@dataclass
class Expectation:
    """The estimate of a step, and the times of the first steps.

    Attributes:
        seconds: The estimate; None: there is none for these devices.
        place: What it is for, such as `4 x 8 h100`.
    """

    seconds: float | None = None
    place: str = ""
    _num_steps: int = 0
    _times: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config, plan: BatchPlan, device: torch.device) -> Expectation:
        """Returns the estimate for the devices of this process; none where the planner has no constants of them.

        Args:
            config: A validated configuration.
            plan: Its batch plan.
            device: Of this rank.
        """
        devices = devices_here(plan.world_size, device.type)
        if config.cluster.file is None and config.cluster.device is None and not devices.is_known():
            return cls()
        cluster = cluster_for(config, devices)
        return cls(
            step_time(config, plan, cluster).seconds,
            f"{cluster.nodes} x {cluster.devices_per_node} {cluster.name}",
        )

    def after_step(self, seconds: float, is_plain: bool = True) -> str | None:
        """Takes the time of a step that the host has measured; returns what there is to say, once.

        Args:
            seconds: From the start of the step to its end, without the wait for its data, which is no part of the
                estimate.
            is_plain: Whether nothing was measured in it (TEV, gradients, QK-clip), which is none either.
        """
        self._num_steps += 1
        if self.seconds is None or self._num_steps > LAST:
            return None
        if self._num_steps >= FIRST and is_plain:
            self._times.append(seconds)
        if self._num_steps < LAST or not self._times:
            return None
        measured = statistics.median(self._times)
        share = measured / self.seconds - 1.0
        compared = f"{100 * abs(share):.0f} % {'longer' if share > 0 else 'shorter'} than"
        text = (
            f"a step takes {measured:.3g} s (median of {len(self._times)} step(s), without waits for data), {compared} "
            f"the planner's estimate of {self.seconds:.3g} s for {self.place}"
        )
        if abs(share) <= TOLERANCE:
            return text
        return f"warning: {text}: its constants may not be those of these nodes; sbatch slurm/check.sh measures them"
