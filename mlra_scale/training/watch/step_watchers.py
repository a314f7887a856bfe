"""Watchers of the run itself: finite values, step metrics, torch.profiler, and Python's garbage collector."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import profiler

from mlra_scale.config import BatchPlan, Config, ProfileConfig, TrainConfig
from mlra_scale.planning.step_time import step_time
from mlra_scale.stability.watcher import Step, Watcher
from mlra_scale.training.exit_codes import TrainingStopped
from mlra_scale.training.start.device import devices_here
from mlra_scale.training.start.plan import cluster_for

if TYPE_CHECKING:  # importing an engine imports DeepSpeed
    from mlra_scale.parallel import StepResult, UpdateProposal


GIB = 2.0**30
_PROFILE_ROWS = 15
FIRST_COMPARED, LAST_COMPARED = 6, 20
"""Steps of this start whose time is compared with the estimate; the first ones compile and fill caches."""
TOLERANCE = 0.25

_PEAK_TFLOPS_16_BIT: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("A100", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.05),
    ("L4", 121.0),
)
"""Dense bf16 tensor-core peak in TFLOP/s by words of the device's name, the more special name first.

Source: the 'BFLOAT16 Tensor Core' rows, without sparsity, of NVIDIA's data sheets of these products (HGX B200 for the
B200). Where a sheet gives only the number with sparsity, it is halved.
"""


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


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Returns the peak of one device in TFLOP/s, for MFU: `train.peak_tflops`, or that of the table.

    None for CPUs, unknown devices, and fp32, whose peak depends on TF32.
    """
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops
    if device.type != "cuda" or config.train.precision == "fp32":
        return None
    return peak_of_device_name(torch.cuda.get_device_name(device))


def peak_of_device_name(name: str) -> float | None:
    """Returns the dense 16-bit peak in TFLOP/s of a device, or None if it is not in the table."""
    words = name.replace("-", " ").split()
    for part, peak in _PEAK_TFLOPS_16_BIT:
        if all(word in words for word in part.split()):
            return peak
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Returns this process's peak memory: that of the device on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # which Linux counts in KiB


def estimate_step(config: Config, plan: BatchPlan, device: torch.device) -> tuple[float, str] | None:
    """Returns the planner's seconds for a step and the devices that they are for, such as `4 x 8 h100`.

    None where the planner has no constants for the devices of this process.
    """
    devices = devices_here(plan.world_size, device.type)
    if config.cluster.file is None and config.cluster.device is None and not devices.is_known():
        return None
    cluster = cluster_for(config, devices)
    name = f"{cluster.nodes} x {cluster.devices_per_node} {cluster.name}"
    return step_time(config, plan, cluster).seconds, name


class StepMetrics(Watcher):
    """Measures throughput without evaluation and checkpoints, and returns the values of logged steps.

    Args:
        config: The configuration of the run.
        plan: Its batch plan.
        device: This rank's device.
        say: Prints how the first steps compare with the planner's estimate, once; None: they are not compared.
    """

    name = "step"

    def __init__(
        self, config: Config, plan: BatchPlan, device: torch.device, say: Callable[[str], None] | None = None
    ) -> None:
        self._tokens_per_step, self._device = plan.tokens_per_step, device
        self._say = say or (lambda text: None)
        self._estimate = None if say is None else estimate_step(config, plan, device)
        self._flops_per_token = config.model.flops_per_token(config.train.sequence_length)
        peak = peak_tflops(config, device)
        self._peak_flops = None if peak is None else peak * 1e12 * plan.world_size
        self._seconds = self._seconds_since_log = 0.0
        self._steps = self._steps_since_log = 0
        self._loss_sum, self._num_losses = 0.0, 0  # finite losses since the last logged step
        self._compared: list[float] = []

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        seconds = time.perf_counter() - step.started
        self._seconds += seconds
        self._seconds_since_log += seconds
        self._steps += 1
        self._steps_since_log += 1
        if math.isfinite(result.loss):
            self._loss_sum += result.loss
            self._num_losses += 1
        self._compare(seconds - step.read_seconds, is_plain=not step.measuring_seconds)
        if not step.is_logged:
            return {}
        values: dict[str, Any] = {
            "loss": result.loss,
            **self._mean_loss(),
            "gradient_norm": result.gradient_norm,
            "learning_rate": step.learning_rate,
            **self._throughput(),
            "memory_gib": peak_memory_bytes(self._device) / GIB,
        }
        if result.loss_scale is not None:
            values |= {"loss_scale": result.loss_scale, "overflow": result.overflow}
        return values

    def state(self) -> dict[str, float]:
        return {"loss_sum": self._loss_sum, "num_losses": self._num_losses}

    def load_state(self, state: Mapping[str, float]) -> None:
        self._loss_sum, self._num_losses = float(state["loss_sum"]), int(state["num_losses"])

    @property
    def mean_tokens_per_second(self) -> float:
        """Over all steps of this start, the first and slowest included."""
        return self._steps * self._tokens_per_step / self._seconds if self._seconds > 0 else 0.0

    def _mean_loss(self) -> dict[str, float]:
        """Returns loss_mean, over the steps since the last call; nothing where that is the loss of one step."""
        total, number = self._loss_sum, self._num_losses
        self._loss_sum, self._num_losses = 0.0, 0
        return {"loss_mean": total / number} if number > 1 else {}

    def _throughput(self) -> dict[str, float]:
        """Returns tokens_per_second and, where a peak is known, mfu since the last call."""
        seconds, tokens = self._seconds_since_log, self._steps_since_log * self._tokens_per_step
        rate = tokens / seconds if seconds > 0 else 0.0
        self._seconds_since_log, self._steps_since_log = 0.0, 0
        values = {"tokens_per_second": rate}
        if self._peak_flops is not None:
            values["mfu"] = rate * self._flops_per_token / self._peak_flops
        return values

    def _compare(self, seconds: float, is_plain: bool) -> None:
        """Compares the first steps with the estimate, which includes neither waits for data nor measurements."""
        if self._estimate is None or self._steps > LAST_COMPARED:
            return
        if self._steps >= FIRST_COMPARED and is_plain:
            self._compared.append(seconds)
        if self._steps < LAST_COMPARED or not self._compared:
            return
        estimate, devices = self._estimate
        measured = statistics.median(self._compared)
        share = measured / estimate - 1.0
        difference = f"{100 * abs(share):.0f} % {'longer' if share > 0 else 'shorter'} than"
        text = (
            f"a step takes {measured:.3g} s (median of {len(self._compared)} step(s), without waits for data), "
            f"{difference} the planner's estimate of {estimate:.3g} s for {devices}"
        )
        if abs(share) > TOLERANCE:
            text = (
                f"warning: {text}: its constants may not be those of these nodes; sbatch slurm/check.sh measures them"
            )
        self._say(text)


class StepProfiler(Watcher):
    """Profiles the steps start ... stop - 1; leaves a trace file, and prints a table of the heaviest operations.

    Args:
        config: First step, and first step that is no longer profiled; start None for no profile.
        folder: Where the trace is written.
        device: On a GPU its activity is recorded too.
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
        operations = profile.key_averages().table(sort_by=order, row_limit=_PROFILE_ROWS, max_name_column_width=48)
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
