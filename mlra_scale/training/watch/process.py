"""What watches the process: torch.profiler over a span of steps, and Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import profiler

from mlra_scale.config import ProfileConfig
from mlra_scale.stability.watcher import Step, Watcher

if TYPE_CHECKING:
    from mlra_scale.parallel.interface import StepResult

_ROWS = 15


class StepProfiler(Watcher):
    """Profiles the steps start ... stop - 1; leaves a trace file, and prints a table of the heaviest operations.

    Args:
        config: First step, and first step that is no longer profiled; start None for no profile.
        folder: Where the trace is written.
        device: Activity of a GPU is recorded on a GPU only.
        last_step: The run's last step, at which a profile ends too.
        say: Prints; None on ranks that do not profile.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        device: torch.device,
        last_step: int,
        say: Callable[[str], None] | None,
    ) -> None:
        self._start, self._stop, self._last = None if say is None else config.start, config.stop, last_step
        self._say = say or (lambda text: None)
        self._folder = folder
        self._is_cuda = device.type == "cuda"
        self._profile: profiler.profile | None = None
        self._first_step = 0

    def before_step(self, step: Step) -> None:
        if self._profile is None and self._start is not None and self._start <= step.number:
            if self._is_over(step.number):
                return
            activities = [profiler.ProfilerActivity.CPU]
            if self._is_cuda:
                activities.append(profiler.ProfilerActivity.CUDA)
            self._profile = profiler.profile(activities=activities)
            self._first_step = step.number
            self._profile.start()

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        if self._profile is not None and (self._is_over(step.number + 1) or step.number == self._last):
            self._finish(self._profile, step.number)
            self._profile = self._start = None
        return {}

    def _finish(self, profile: profiler.profile, step: int) -> None:
        profile.stop()
        trace = self._folder / f"steps-{self._first_step}-{step}.json"
        outcome = f"{trace} (open in https://ui.perfetto.dev)"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(trace))
        except (OSError, RuntimeError) as error:  # on one rank only; a profile must not end the run
            outcome = f"{trace} cannot be written ({error})"
        order = "self_cuda_time_total" if self._is_cuda else "self_cpu_time_total"
        operations = profile.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=48)
        self._say(f"{operations}\nprofile of steps {self._first_step} to {step}: {outcome}")

    def _is_over(self, step: int) -> bool:
        return self._stop is not None and step >= self._stop


class GarbageCollection(Watcher):
    """Collects Python's garbage at the same steps on all ranks, and not in between while it is entered.

    The automatic collector runs on each rank after some number of allocations. With thousands of ranks some rank
    collects in every step, and all others wait for it in the next collective (as torchtitan and OLMo-core found too).

    Args:
        every: Steps between collections; 0: Python decides, as it does by itself.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        if self._every > 0 and step.number % self._every == 0:
            gc.collect()
        return {}

    def __enter__(self) -> GarbageCollection:
        if self._every > 0:
            gc.disable()
            gc.collect()
            gc.freeze()  # later collections skip the objects of today
        return self

    def __exit__(self, *error: object) -> None:
        if self._every > 0:
            gc.unfreeze()
            gc.enable()
