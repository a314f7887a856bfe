"""The steps of benchmarks/check.py in which ranks train: plan, agreement of layouts, waits for the device, profile."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.calibration import base_of, device_of, random_batches
from benchmarks.check import Task, Write
from benchmarks.contenders import LEARNING_RATE, Shape, config_of, mesh
from benchmarks.harness import seconds_of
from benchmarks.tensor_memory import Started, start
from mlra_scale.config import Config, batch_plan, load_named_config
from mlra_scale.data import Batch
from mlra_scale.parallel import Engine, StepResult, Topology, build_engine
from mlra_scale.planning.choice import choose
from mlra_scale.planning.cluster import GIB, Cluster, named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file
from mlra_scale.planning.memory import rank_memory
from mlra_scale.planning.search import Candidate

WAITS = Path(__file__).resolve().parents[1] / "tests" / "support" / "device" / "expected.py"

SHAPE = Shape("agreement", num_layers=4, hidden_size=128, num_heads=8, batch_size=1, vocab_size=512)
STEPS = 3
LOSS_BOUND, NORM_BOUND = 1e-5, 1e-3
"""Relative differences in fp32 between layouts and one process. Another order of sums changes a norm most."""
BF16_BOUND = 2.0**-9
"""Relative, or twice what one process differs from its own fp32 by: a loss can be right by chance."""


def chosen(task: Task, device: torch.device) -> tuple[Candidate, Cluster]:
    """Returns the layout that a job with parallel.layout=auto would run, by the constants measured so far."""
    overrides = [*task.overrides, f"train.device={task.device}"]
    config, named = load_named_config(task.preset, None, None, overrides)
    file, base = Path(task.folder) / "cluster.json", base_of(task, device)
    cluster = read_cluster_file(file) if file.exists() else named_cluster(base["name"])
    sizes = {name: value for name, value in base.items() if name in ("nodes", "devices_per_node", "memory")}
    choice = choose(config, named, replace(cluster, **sizes))
    return choice.chosen, choice.cluster


def training(task: Task, write: Write) -> dict[str, Any]:
    """Steps of the preset in the planner's layout: memory and time against the plan."""
    device = device_of(task)
    candidate, cluster = chosen(task, device)
    config, plan = candidate.config, candidate.plan
    with mesh(config, device) as topology:
        planned = rank_memory(config, plan, topology.pipeline_rank).device
        started = _started(config, topology)
        peak, reserved = started.peak_bytes, 0.0
        if device.type == "cuda":  # what the device holds beside tensors
            free, total = torch.cuda.mem_get_info(device)
            reserved = max(0.0, float(total - free - torch.cuda.max_memory_allocated(device)))
        seconds = [_timed(started.step, number, device) for number in range(2, 5)]
        numbers = torch.tensor([peak, planned, peak / planned, reserved], dtype=torch.float64, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    most, most_planned, ratio, reserved = numbers.tolist()
    middle = sorted(seconds)[1]
    mfu = candidate.time.mfu * candidate.time.seconds / middle
    lines = [
        f"{task.preset}: {' '.join(candidate.overrides())} {candidate.engine.file}",
        f"memory of the rank that is furthest above its plan: {ratio:.3f} of it; the largest {most / GIB:.2f} GiB, "
        f"planned {most_planned / GIB:.2f}",
        f"step {middle:.3f} s, planned {candidate.time.seconds:.3f} ({middle / candidate.time.seconds:.2f} of it)",
        f"{plan.tokens_per_step / middle:,.0f} tokens/s, MFU {100 * mfu:.1f} %",
    ]
    constants = {"reserved": reserved} if device.type == "cuda" else {}
    found = {"seconds": seconds, "planned_seconds": candidate.time.seconds, "peak": most, "planned_peak": most_planned}
    return {"holds": 0.9 <= ratio <= 1.1, "lines": lines, "constants": constants, "cluster": cluster.name, **found}


def _started(config: Config, topology: Topology) -> Started[int]:
    """Returns a training that has taken its steps 0 and 1."""
    plan = batch_plan(config, topology.world_size)

    def build() -> Callable[[int], float]:
        engine = build_engine(config, plan, topology)
        return lambda number: _step(engine, random_batches(config, plan, number)).loss

    return start(build, topology.device, 0, 1)


def _step(engine: Engine, batches: list[Batch]) -> StepResult:
    return engine.train_batch(batches, LEARNING_RATE, lambda proposal: proposal.is_finite)


def _timed(step: Callable[[int], float], number: int, device: torch.device) -> float:
    dist.barrier()
    return seconds_of(lambda: step(number), device)


def profile(task: Task, write: Write) -> dict[str, Any]:
    """The heaviest operations of a step of the preset, of one process, and the share of it in which the GPU works."""
    device = device_of(task)
    alone = replace(task, world_size=1, devices_per_node=1)
    candidate, _ = chosen(replace(alone, overrides=(*task.overrides, "train.global_batch_size=8")), device)
    with mesh(candidate.config, device) as topology:
        started = _started(candidate.config, topology)
        with torch.profiler.profile() as recorded:
            seconds = _timed(started.step, 2, device)
        averages = recorded.key_averages()
        busy = sum(row.self_device_time_total for row in averages) / 1e6
        recorded.export_chrome_trace(str(Path(task.folder) / "profile-trace.json"))
    table = averages.table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=60)
    lines = [f"the GPU works {100 * busy / seconds:.0f} % of a profiled step of {seconds:.3f} s", *table.splitlines()]
    return {"holds": None, "lines": lines, "busy": busy / seconds}


def synchronizations(task: Task, write: Write) -> dict[str, Any]:
    """Where the host waits for the device in a step, and how often, against the list that the traced tests keep."""
    device, allowed = device_of(task), known_waits()
    result: dict[str, Any] = {"holds": True, "lines": [], "waits": {}}
    for name in ("ZeRO 1", "ZeRO 3", "pipeline engine"):
        config = _configuration(layouts_of(1, 1)[name], "bf16", task, 1)
        with mesh(config, device) as topology:
            engine = build_engine(config, batch_plan(config, 1), topology)
            batches = [_share(config, topology, step) for step in range(2 + STEPS)]
            for batch in batches[:2]:
                _step(engine, batch)
            torch.cuda.set_sync_debug_mode("warn")
            with noted_waits() as found:
                for batch in batches[2:]:
                    _step(engine, batch)
            torch.cuda.set_sync_debug_mode("default")
        for site, count in found.most_common():
            is_known = count / STEPS <= allowed.get(site, 0)
            result["holds"] = result["holds"] and is_known
            known = "in the list" if is_known else f"NOT IN THE LIST more than {allowed.get(site, 0)} times"
            result["lines"].append(f"{name}: {count / STEPS:g} per step, {known}: {site}")
        result["waits"][name] = dict(found)
        write(result)
    return result


def known_waits() -> dict[str, int]:
    """Returns how often the host may wait in a step, by function: the list of the tests that trace the engines."""
    listed: dict[str, int] = {}
    for wait in run_path(str(WAITS), run_name="waits")["WAITS"]:
        listed[wait.site] = listed.get(wait.site, 0) + wait.number
    return listed


@contextlib.contextmanager
def noted_waits() -> Iterator[Counter[str]]:
    """Counts torch's warnings of waits for the device, by the innermost function of this package or DeepSpeed."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *more: Any) -> None:
        if "synchronizing" in str(message):
            found[next(_sites(sys._getframe(1)), "elsewhere")] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        yield found


def _sites(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        name = frame.f_code.co_filename
        at = max(name.rfind(package) for package in ("/mlra_scale/", "/deepspeed/", "/megatron/"))
        # The list names the function that asks for a value of the device, not what forwards the request.
        if at >= 0 and not any(part in name for part in ("/deepspeed/accelerator/", "/deepspeed/comm/", "/nvtx.py")):
            yield f"{name[at + 1 :]}:{frame.f_code.co_qualname}"
        frame = frame.f_back


def layouts_of(world_size: int, devices_per_node: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the layouts that so many ranks can have, as sections of a configuration, by name."""
    zero = {"reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000}
    found: dict[str, dict[str, dict[str, Any]]] = {"ZeRO 0": {}}
    for stage in (1, 2, 3):
        found[f"ZeRO {stage}"] = {"deepspeed": {"zero_optimization": {"stage": stage, **zero}}}
    found["pipeline engine"] = {"parallel": {"engine": "pipeline"}}
    degrees = [(2, 1), (1, 2), (2, 2), (2, 4), (devices_per_node, 1)]
    for tensor, pipeline in dict.fromkeys(degrees):
        is_possible = world_size % (tensor * pipeline) == 0 and SHAPE.num_heads % tensor == 0
        if tensor * pipeline > 1 and is_possible:
            found[f"tensor {tensor} x pipeline {pipeline}"] = {"parallel": {"tensor": tensor, "pipeline": pipeline}}
            if tensor > 1 and pipeline == 1:
                parallel = {"tensor": tensor, "sequence_parallel": True}
                found[f"tensor {tensor}, sequence parallel"] = {"parallel": parallel}
                found[f"tensor {tensor}, ZeRO 3"] = {"parallel": {"tensor": tensor}, **found["ZeRO 3"]}
    return found


def alone(task: Task, write: Write) -> dict[str, Any]:
    """Losses and gradient norms of one process, in fp32 and bf16, on the samples of all ranks."""
    device = device_of(task)
    # As many samples at once as divide the batch: with a thousand ranks one by one would take minutes.
    size = max(size for size in range(1, 65) if 2 * task.world_size % size == 0)
    found = {precision: _trajectory({}, precision, task, device, size) for precision in ("fp32", "bf16")}
    return {"holds": None, "lines": [f"{name}: losses {values['losses']}" for name, values in found.items()], **found}


def layouts(task: Task, write: Write) -> dict[str, Any]:
    """Losses and gradient norms of layouts of all ranks, against those of one process."""
    expected = task.result_of("alone")
    if not {"fp32", "bf16"} <= expected.keys():
        raise ValueError("the step 'alone', which this one is compared with, has no result; run both")
    device = device_of(task)
    result: dict[str, Any] = {"holds": True, "lines": [], "layouts": {}}
    for name, sections in layouts_of(task.world_size, task.devices_per_node).items():
        for precision in ("fp32", "bf16"):
            found = _trajectory(sections, precision, task, device)
            fault = difference(found, precision, expected)
            result["layouts"][f"{name}, {precision}"] = {**found, "fault": fault}
            result["lines"].append(f"{name + ', ' + precision + ':':34}{fault or 'agrees with one process'}")
            result["holds"] = result["holds"] and not fault
            write(result)
    return result


def difference(found: dict[str, list[float]], precision: str, expected: dict[str, Any]) -> str:
    """Returns what differs from one process by more than it may, as text; empty: nothing.

    Args:
        found: Losses and gradient norms of a layout by step.
        precision: Of the layout.
        expected: Of one process, by precision.
    """
    exact, own = expected["fp32"], expected[precision]
    for kind, bound in (("losses", LOSS_BOUND), ("norms", NORM_BOUND)):
        for step, (value, one, reference) in enumerate(zip(found[kind], own[kind], exact[kind], strict=True), start=1):
            allowed = bound * abs(reference)
            if precision == "bf16":
                allowed = max(2 * abs(one - reference), (BF16_BOUND if kind == "losses" else 0.05) * abs(reference))
            if not abs(value - reference) <= allowed:
                return f"DIFFERS: {kind} {value!r} at step {step}, one process has {one!r} ({reference!r} in fp32)"
    return ""


def _trajectory(
    sections: dict[str, dict[str, Any]], precision: str, task: Task, device: torch.device, size: int = 1
) -> dict[str, list[float]]:
    """Returns losses and gradient norms of the first steps of a layout, with micro-batches of a size."""
    config = _configuration(sections, precision, task, size)
    with mesh(config, device) as topology:
        plan = batch_plan(config, topology.world_size)
        engine = build_engine(config, plan, topology)
        results = [_step(engine, _share(config, topology, step)) for step in range(STEPS)]
    return {"losses": [each.loss for each in results], "norms": [each.gradient_norm for each in results]}


def _configuration(sections: dict[str, dict[str, Any]], precision: str, task: Task, size: int) -> Config:
    batch = {"global_batch_size": 2 * task.world_size, "micro_batch_size": size, "device": task.device}
    return config_of(SHAPE, "mlra", precision, train=batch, **sections)


def _share(config: Config, topology: Topology, step: int) -> list[Batch]:
    """Returns this rank's micro-batches; which samples a step has does not depend on the layout."""
    batch, size = config.train.global_batch_size, config.train.micro_batch_size
    starts = range(step * batch + topology.data_rank * size, (step + 1) * batch, topology.data * size)
    return [SHAPE.samples(range(start, start + size)) for start in starts]
