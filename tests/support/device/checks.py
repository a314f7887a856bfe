"""Holds a report against what is planned and what is expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tests.support.device import expected
from tests.support.device.report import Phase, Report

GROUPS = {"tensor": "tensor", "pipeline": "pipeline", "tied": "ends", "data": "data"}
"""The planner's kind of message, and the group over which it goes."""
MIB = 2.0**20


def problems(report: Report) -> list[str]:
    """Returns everything that is wrong with a layout, each in a line; none: all is well."""
    return [
        *placement(report),
        *memory(report),
        *messages(report),
        *matrices(report),
        *waits(report),
        *launches(report),
        *types(report),
        *groups(report),
    ]


def placement(report: Report) -> Iterator[str]:
    """Parameters, buffers, messages and results that are not where they must be."""
    for name in report.misplaced:
        yield f"{name} is not on the device"
    for what, number in report.step.misplaced.items():
        yield f"{number} x {what}"
    for site, size in report.step.host_results.items():
        if site in expected.HOST_RESULTS:
            continue
        yield f"the host computes {size / MIB:.1f} MiB a step by itself: {site}"


def memory(report: Report) -> Iterator[str]:
    """A peak that is not the planned one."""
    traced, planned = report.step.peak, report.planned_bytes
    if abs(traced / planned - 1.0) > expected.MEMORY_TOLERANCE:
        held = ", ".join(f"{size / MIB:.0f} {site}" for site, size in report.step.holders.most_common(6))
        yield (
            f"the peak is {traced / MIB:.0f} MiB and planned are {planned / MIB:.0f} ({traced / planned - 1.0:+.1%}); "
            f"held there, in MiB: {held}"
        )


def messages(report: Report) -> Iterator[str]:
    """Kinds of messages whose bytes are not the planned ones, and bytes in groups that the planner does not know."""
    for kind, planned in report.planned_sent.items():
        sent = report.step.sent(GROUPS[kind])
        if abs(sent - planned) > expected.BYTES_TOLERANCE * max(planned, MIB):
            change = f" ({sent / planned - 1.0:+.1%})" if planned else ""
            yield f"{kind}: {sent / MIB:.2f} MiB are sent in a step, and planned are {planned / MIB:.2f}{change}"
    others = {group for _, group, _ in report.step.messages} - set(GROUPS.values())
    if (sent := report.step.sent(*others)) > expected.MAX_OTHER_BYTES:
        most = expected.MAX_OTHER_BYTES
        yield f"{sent:.0f} bytes are sent in a step over {', '.join(sorted(others))}; {most} at most"


def matrices(report: Report) -> Iterator[str]:
    """What muon and spectron send or start, and do not plan to."""
    traced, planned = report.step.of_matrices, report.matrices
    if planned is None:
        if traced.number:
            yield f"{traced.number} messages are sent for matrices, which AdamW updates"
        return
    if abs(traced.sent - planned.expected_sent) > 1.0:
        yield f"{traced.sent:.0f} bytes are sent for matrices; {planned.expected_sent:.0f} are to be moved"
    if abs(planned.mean_sent - planned.planned_sent) > expected.BYTES_TOLERANCE * planned.planned_sent:
        mean, of_plan = planned.mean_sent, planned.planned_sent
        yield f"the mean rank sends {mean:.0f} bytes for matrices, and planned are {of_plan:.0f}"
    if traced.number != planned.planned_messages:
        yield f"{traced.number} messages are sent for matrices, and planned are {planned.planned_messages}"
    least, most = expected.ADDED_SHARES
    if not least <= planned.added / planned.planned_added <= most:
        yield (
            f"the update of matrices needs {planned.added / MIB:.1f} MiB, and planned are "
            f"{planned.planned_added / MIB:.1f}"
        )
    if abs(planned.num_launches / planned.planned_launches - 1.0) > expected.LAUNCHES_TOLERANCE:
        yield (
            f"muon and spectron start {planned.num_launches} kernels for {planned.number} matrices, and planned are "
            f"{planned.planned_launches:.0f}"
        )


def waits(report: Report) -> Iterator[str]:
    """Waits of the host that the list does not have, and too many of them."""
    yield from unlisted(report.step, expected.WAITS)
    is_zero_3 = "Stage3" in report.engine[1]
    most = expected.MAX_WAITS_ZERO_3 if is_zero_3 else expected.MAX_WAITS
    if "offload" in report.layout:
        most = expected.MAX_WAITS_OFFLOAD
    if report.step.num_waits > most:
        yield f"the host waits {report.step.num_waits} times in a step; {most} at most"
    yield from flow_control(report)


def flow_control(report: Report) -> Iterator[str]:
    """Flow control that is not seen where ZeRO 3 has it, is elsewhere, or is more than its sites can have."""
    is_zero_3 = "Stage3" in report.engine[1]
    if is_zero_3 != (report.step.num_flow_control > 0):
        yield f"flow control lets the host wait {report.step.num_flow_control} times in a step"
    for wait in expected.FLOW_CONTROL:
        most = wait.number * report.num_parameters * report.num_micro_batches
        number = sum(n for (kind, site, _), n in report.step.waits.items() if (kind, site) == (wait.kind, wait.site))
        if number > most:
            yield f"flow control lets the host wait {number} times in {wait.site}; {most} at most"


def unlisted(phase: Phase, allowed: tuple[expected.Wait, ...]) -> Iterator[str]:
    """Waits that a list does not have, or not as often; flow control is none of them."""
    limits = {(wait.kind, wait.site): wait.number for wait in allowed}
    found: Counter[tuple[str, str]] = Counter()
    for (kind, site, _), number in phase.waits.items():
        if not expected.is_flow_control(kind, site):
            found[kind, site] += number
    for (kind, site), number in found.items():
        limit = limits.get((kind, site), 0)
        if number > limit:
            lines = next(lines for of, at, lines in phase.waits if (of, at) == (kind, site))
            yield f"the host waits {number} times ({limit} are listed) for {kind} in {site}: {lines}"


def launches(report: Report) -> Iterator[str]:
    """More kernels than the recorded ceiling."""
    ceiling = expected.LAUNCHES.get(report.layout)
    if ceiling is None:
        yield f"no ceiling of kernels is recorded; {report.launches_per_block:.1f} per block and micro-batch"
    elif report.launches_per_block > ceiling:
        yield (
            f"a block starts {report.launches_per_block:.1f} kernels per micro-batch (forward, backward: "
            f"{report.block_launches}, between: {report.between_launches} / {report.num_blocks}); the ceiling is "
            f"{ceiling}"
        )


def types(report: Report) -> Iterator[str]:
    """Matrix products of fp32 in a step of 16 bits."""
    for site, number in report.step.wide_products.items():
        yield f"{number} matrix products of fp32: {site}"


def groups(report: Report) -> Iterator[str]:
    """Another number of process groups than the recorded one."""
    number, recorded = sum(report.groups.values()), expected.PROCESS_GROUPS.get(report.mesh)
    if number != recorded:
        yield f"{number} process groups are created, and {recorded} are recorded; by number of ranks: {report.groups}"
