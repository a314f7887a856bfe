"""Where the time of a step goes: torch's operators, of two contenders side by side."""

from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Step
from mlra_scale.data import Batch


@dataclass(frozen=True)
class Operator:
    """One operator of a step.

    Attributes:
        seconds: Of its own, without the operators that it calls; on a GPU the kernels'.
        calls: How often it ran.
    """

    seconds: float
    calls: int


def operators_of(step: Step, batch: Batch, device: torch.device) -> dict[str, Operator]:
    """Profiles one step.

    Returns:
        By name of operator, the longest first. Profiling adds to every call, so that many short ones look longer.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        step(batch)
    found = {
        event.key: Operator((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6, event.count)
        for event in trace.key_averages()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def side_by_side(names: tuple[str, str], operators: tuple[dict[str, Operator], dict[str, Operator]]) -> list[str]:
    """Two profiles as a table.

    Args:
        names: Of the contenders.
        operators: Of each.

    Returns:
        Lines: a sum, and the operators that take 0.5 % of the step of either contender, those that differ most first.
    """
    nothing = Operator(0.0, 0)
    totals = [sum(operator.seconds for operator in found.values()) for found in operators]
    rows: list[tuple[str, Operator, Operator]] = []
    for name in {**operators[0], **operators[1]}:
        one, two = operators[0].get(name, nothing), operators[1].get(name, nothing)
        if one.seconds > 0.005 * totals[0] or two.seconds > 0.005 * totals[1]:
            rows.append((name, one, two))
    rows.sort(key=lambda row: -abs(row[1].seconds - row[2].seconds))
    lines = [
        f"operators of one step, own time in ms and calls, profiled ({names[0]} | {names[1]} | difference)",
        _line("all", totals[0], "", totals[1], ""),
    ]
    lines += [_line(name, one.seconds, str(one.calls), two.seconds, str(two.calls)) for name, one, two in rows]
    return lines


def _line(name: str, one: float, calls_one: str, two: float, calls_two: str) -> str:
    numbers = f"{one * 1e3:>10.1f}{calls_one:>7} |{two * 1e3:>10.1f}{calls_two:>7} |{(one - two) * 1e3:>+10.1f}"
    return f"{name[:58]:60}{numbers}"
