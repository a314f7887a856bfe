"""Step metrics: throughput, MFU, memory, their console lines, and the comparison with the planner's estimate."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlra_scale.config import BatchPlan, Config, batch_plan, load_config
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import write_cluster_file
from mlra_scale.stability.watcher import Step
from mlra_scale.training.log.console import duration, train_line, validation_line
from mlra_scale.training.watch import step_watchers
from mlra_scale.training.watch.step_watchers import (
    FIRST_COMPARED,
    LAST_COMPARED,
    StepMetrics,
    estimate_step,
    peak_memory_bytes,
    peak_of_device_name,
    peak_tflops,
)

CPU = torch.device("cpu")
RESULT: Any = SimpleNamespace(loss=2.0, gradient_norm=1.0, loss_scale=None, overflow=False)


class Clock:
    """A clock that stands still between the times at which steps end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(step_watchers.time, "perf_counter", lambda: self.now)

    def step(self, metrics: StepMetrics, seconds: float, waited: float = 0.0, is_plain: bool = True) -> dict[str, Any]:
        """Does a logged step; returns what is recorded."""
        started, self.now = self.now, self.now + seconds
        measured = {} if is_plain else {"tev": 0.1}
        step = Step(1, True, 0, learning_rate=1e-3, started=started, read_seconds=waited, measuring_seconds=measured)
        return dict(metrics.after_step(step, RESULT))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA A10": 125.0,
    "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0, "NVIDIA H200": 989.4, "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4, "NVIDIA B200": 2250.0, "NVIDIA L40S": 362.05, "NVIDIA L4": 121.0,
    "NVIDIA GeForce GTX 1080": None,
}  # fmt: skip


def test_peaks_are_known_by_name() -> None:
    assert {name: peak_of_device_name(name) for name in PEAKS} == PEAKS


def test_the_peak_is_unknown_on_a_cpu_and_in_fp32_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(load_config("debug"), CPU) is None
    assert peak_tflops(load_config("debug", overrides=["train.peak_tflops=0.5"]), CPU) == 0.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert peak_tflops(load_config("debug"), gpu) is None
    assert peak_tflops(load_config("debug", overrides=["train.precision=bf16"]), gpu) == 989.4


def test_throughput_counts_only_the_time_of_steps(clock: Clock) -> None:
    config = load_config("debug", overrides=["train.peak_tflops=1.0"])
    plan: Any = SimpleNamespace(tokens_per_step=512, world_size=2)
    metrics = StepMetrics(config, plan, CPU)
    unlogged = Step(1, False, 0, started=clock.now)
    clock.now += 2.0
    assert metrics.after_step(unlogged, RESULT) == {}
    clock.now += 150.0  # an evaluation
    values = clock.step(metrics, 2.0)
    assert values["tokens_per_second"] == 256.0
    assert values["mfu"] == pytest.approx(256.0 * config.model.flops_per_token(64) / 2e12)
    assert clock.step(metrics, 1.0)["tokens_per_second"] == 512.0
    assert metrics.mean_tokens_per_second == 3 * 512 / 5.0
    assert 10 * 2**20 < peak_memory_bytes(CPU) < 2**40


def test_the_mean_loss_is_that_of_the_steps_since_the_last_logged_one_also_after_a_resume(clock: Clock) -> None:
    def step(metrics: StepMetrics, loss: float, is_logged: bool = False) -> Any:
        result: Any = SimpleNamespace(loss=loss, gradient_norm=1.0, loss_scale=None, overflow=False)
        return metrics.after_step(Step(1, is_logged, 0, started=clock.now), result)

    config = load_config("debug")
    plan = batch_plan(config, 1)
    metrics, resumed = StepMetrics(config, plan, CPU), StepMetrics(config, plan, CPU)
    assert "loss_mean" not in step(metrics, 5.0, is_logged=True), "one step: it is the loss"
    step(metrics, 4.0)
    step(metrics, float("inf"))
    resumed.load_state(json.loads(json.dumps(metrics.state())))
    for each in (metrics, resumed):
        assert step(each, 3.0, is_logged=True)["loss_mean"] == 3.5, "without the one that is not finite"
        assert "loss_mean" not in step(each, 2.0, is_logged=True)


def test_lines() -> None:
    record = {"step": 7, "loss": 6.23456, "gradient_norm": 1.2345, "learning_rate": 3e-4, "tokens_per_second": 12345.6}
    record["memory_gib"] = 0.51
    line = train_line(record, 100, 75.0, 996.0)
    shown = "step   7/100 | loss 6.2346 | grad 1.23 | lr 3.00e-04 | 12,346 tok/s | 0.51 GiB | 1:15, 16:36 left"
    assert line == shown
    full = {**record, "mfu": 0.345, "tev_mean": 0.02, "tev_std": 0.001, "loss_scale": 65536.0, "overflow": True}
    full["loss_mean"] = 6.3  # of the steps since the last line
    for part in ("loss 6.3000", "MFU 34.5 %", "TEV 0.02000 +- 0.00100", "scale 65536", "overflow"):
        assert part in train_line(full, 100, 1.0, None)
    assert "TEV 0.02000 +- 0.00100 (of step 5) |" in train_line({**full, "tev_step": 5}, 100, 1.0, None)
    evaluation = {"step": 7, "validation_loss": 5.0, "validation_perplexity": 148.41}
    assert validation_line(evaluation, 100) == "step   7/100 | validation loss 5.0000 | perplexity 148.4"
    assert [duration(seconds) for seconds in (0.4, 59.6, 3600.0, 90061.0)] == ["0:00", "1:00", "1:00:00", "25:01:01"]


def compared_with(seconds: float, devices: str, monkeypatch: pytest.MonkeyPatch) -> tuple[StepMetrics, list[str]]:
    """Metrics that compare steps with this estimate, and what they print."""
    config, printed = load_config("debug"), list[str]()
    monkeypatch.setattr(step_watchers, "estimate_step", lambda *_: (seconds, devices))
    return StepMetrics(config, batch_plan(config, 1), CPU, printed.append), printed


def test_the_estimate_is_compared_once_after_twenty_steps_without_the_first_ones(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, printed = compared_with(1.0, "4 x 8 h100", monkeypatch)
    for seconds in [50.0] * (FIRST_COMPARED - 1) + [3.1] * (LAST_COMPARED - FIRST_COMPARED):
        clock.step(metrics, seconds, waited=2.0)
    assert printed == []
    for _ in range(LAST_COMPARED):
        clock.step(metrics, 1.1)
    assert printed == [
        "a step takes 1.1 s (median of 15 step(s), without waits for data), 10 % longer than the planner's estimate of "
        "1 s for 4 x 8 h100"
    ]


def test_steps_with_measurements_do_not_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three steps measure something, and take three times as long."""
    (metrics, printed), (busy, nothing) = (compared_with(1.0, "4 x 8 h100", monkeypatch) for _ in range(2))
    for number in range(1, LAST_COMPARED + 1):
        clock.step(metrics, *((1.0, 0.0, True) if number % 3 == 0 else (3.0, 0.0, False)))
        clock.step(busy, 3.0, is_plain=False)
    (text,) = printed
    assert text.startswith("a step takes 1 s (median of 5 step(s), without waits for data), 0 % ") and nothing == []


@pytest.mark.parametrize(("measured", "warned"), [(1.24, False), (1.26, True), (0.76, False), (0.74, True)])
def test_more_than_a_quarter_off_is_a_warning(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, measured: float, warned: bool
) -> None:
    metrics, printed = compared_with(1.0, "1 x 8 h200", monkeypatch)
    for _ in range(LAST_COMPARED):
        clock.step(metrics, measured)
    (text,) = printed
    assert text.startswith("warning: ") == warned and text.endswith("slurm/check.sh measures them") == warned
    assert ("shorter than" if measured < 1 else "longer than") in text and "\n" not in text


def test_cpus_are_compared_only_where_they_were_measured(tmp_path: Path) -> None:
    def estimate_of(*overrides: str) -> tuple[float, str] | None:
        config: Config = load_config("debug", overrides=["train.device=cpu", *overrides])
        plan: BatchPlan = batch_plan(config, 1)
        return estimate_step(config, plan, CPU)

    file = tmp_path / "cluster.json"
    write_cluster_file(file, replace(named_cluster("cpu"), name="these cores"), [])
    estimate = estimate_of(f"cluster.file={file}")
    assert estimate is not None and estimate[0] > 0.0 and estimate[1] == "1 x 1 these cores"
    assert estimate_of() is None
