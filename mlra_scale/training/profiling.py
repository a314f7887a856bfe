"""torch.profiler over a span of steps, on rank 0."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import profiler

from mlra_scale.config import ProfileConfig

_ROWS = 15


class StepProfiler:
    """Profiles the steps start ... stop - 1 and leaves a trace file and a table of the heaviest operations."""

    def __init__(self, config: ProfileConfig, directory: Path, device: torch.device, is_active: bool) -> None:
        """Prepares a profile.

        Args:
            config: First step, and first step no longer profiled; start None for no profile.
            directory: Where the trace goes.
            device: GPU activity is recorded on a GPU only.
            is_active: False on ranks that do not profile.
        """
        self._start = config.start if is_active else None
        self._stop = config.stop
        self._directory = directory
        self._is_cuda = device.type == "cuda"
        self._profile: profiler.profile | None = None
        self._first_step = 0

    def before(self, step: int) -> None:
        """Begins the profile if `step` is its first."""
        if self._profile is None and self._start is not None and self._start <= step and not self._is_over(step):
            activities = [profiler.ProfilerActivity.CPU]
            if self._is_cuda:
                activities.append(profiler.ProfilerActivity.CUDA)
            self._profile = profiler.profile(activities=activities)
            self._first_step = step
            self._profile.start()

    def after(self, step: int, last_step: int) -> str | None:
        """Ends the profile if `step` is its last, or the run's last.

        Returns:
            A text for the console (table of operations and the trace's path), or None if nothing ended.
        """
        if self._profile is None or not (self._is_over(step + 1) or step == last_step):
            return None
        self._profile.stop()
        trace = self._directory / f"steps-{self._first_step}-{step}.json"
        written = f"{trace} (open in https://ui.perfetto.dev)"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(trace))
        except (OSError, RuntimeError) as error:
            # On one rank only, of which the others would hear nothing; and no profile is worth a run.
            written = f"{trace} cannot be written ({error})"
        order = "self_cuda_time_total" if self._is_cuda else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=48)
        self._profile = None
        self._start = None
        return f"{table}\nprofile of steps {self._first_step} to {step}: {written}"

    def _is_over(self, step: int) -> bool:
        return self._stop is not None and step >= self._stop
