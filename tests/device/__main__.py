"""Traces layouts on a GPU that is not there, and says what was found.

python -m tests.device                     the names of the layouts
python -m tests.device "ZeRO 3 x data 8"   everything that is known of one, or of all whose name contains this text
python -m tests.device NAME layers=4 ...   the same with other values of the layout (`changed`) or configuration
python -m tests.device --json NAME         the report as JSON
python -m tests.device --write             traces all layouts, and writes the tables of docs/device.md
python -m tests.device --write FOLDER      the same from reports (--json) that lie there, where they do
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tests.support.device import document, fake_cuda
from tests.support.device.layouts import ALL, MEASURING, Layout
from tests.support.device.report import PhaseReport, Report
from tests.support.device.running import trace

GIB = 2.0**30


def changed(layout: Layout, overrides: list[str]) -> Layout:
    """The layout with other values; `layers=`, `micro_batches=`, `world_size=`, `rank=`, `ds_config=` are its own."""
    own = {"layers": "num_layers", "micro_batches": "num_micro_batches", "world_size": "world_size", "rank": "rank"}
    for override in overrides:
        name, value = override.split("=", 1)
        if name in own:
            layout = replace(layout, **{own[name]: int(value)})  # type: ignore[arg-type]
        elif name == "ds_config":
            layout = replace(layout, ds_config=value or None)
        else:
            layout = replace(layout, overrides=(*layout.overrides, override))
    return layout


def described(report: Report) -> str:
    """A report as text."""
    step, planned = report.step, report.planned_bytes
    lines = [
        f"{report.layout}: {' / '.join(report.engine)}, {report.num_blocks} blocks, {report.num_micro_batches} "
        f"micro-batches, traced in {max(report.seconds.values()):.0f} s",
        f"  peak {step.peak / GIB:.3f} GiB, planned {planned / GIB:.3f} ({step.peak / planned - 1:+.1%}); kept between "
        f"steps {step.start / GIB:.3f}",
        f"  kernels: {step.num_launches} a step; a block {report.block_launches[0]:g} forward, "
        f"{report.block_launches[1]:g} backward, {report.between_launches} between two micro-batches: "
        f"{report.launches_per_block:.1f} per block and micro-batch; a micro-batch {report.micro_batch_launches}",
        f"  process groups by number of ranks: {report.groups}",
        *(f"  not on the device: {name}" for name in report.misplaced),
        *(f"  planned to send as {kind}: {sent / GIB:.4f} GiB" for kind, sent in report.planned_sent.items()),
    ]
    for name, phase in report.phases.items():
        if name not in ("build", "first step"):
            lines += phase_lines(name, phase)
    return "\n".join(lines)


def phase_lines(name: str, phase: PhaseReport) -> list[str]:
    """A phase as text."""
    groups = sorted({group for _, group, *_ in phase.messages})
    lines = [
        f"  {name}: the host waits {phase.num_waits} times, and at most {phase.num_flow_control} times because it is "
        f"too far ahead; peak {phase.peak / GIB:.3f} GiB"
    ]
    lines += [f"    {number:>5} x {kind}: {lines}" for kind, _, lines, number in phase.waits]
    for group in groups:
        number = sum(count for _, of, _, count, _ in phase.messages if of == group)
        lines.append(f"    sent over {group}: {phase.sent(group) / GIB:.4f} GiB in {number} messages")
    for title, found in (
        ("product of fp32", phase.wide_products),
        ("bytes computed on the host", phase.host_results),
        ("misplaced", phase.misplaced),
    ):
        lines += [f"    {title}: {number} {site}" for site, number in found.items()]
    lines += [f"    held at the peak: {held / GIB:.3f} GiB {site}" for site, held in phase.holders.items()]
    lines.append(f"    kernels: {dict(list(phase.launches.items())[:14])}")
    return lines


def write(folder: Path | None) -> None:
    """Writes the tables of docs/device.md."""
    reports = []
    for layout in ALL:
        file = None if folder is None else folder / f"{layout.name.replace(' ', '_').replace(',', '')}.json"
        if file is not None and file.exists():
            reports.append(Report.from_json(file.read_text(encoding="utf-8")))
        else:
            reports.append(trace(layout))
            print(described(reports[-1]), flush=True)
            if file is not None:
                file.write_text(reports[-1].to_json(), encoding="utf-8")
    document.write("layouts", document.layouts_table(reports))
    document.write("waits", document.waits_table())
    document.write("flow control", document.flow_control_table())
    document.write("measured waits", document.measured_table())


def main(arguments: list[str]) -> int:
    """The command line."""
    if not arguments:
        print("\n".join(layout.name for layout in (*ALL, *MEASURING)))
        return 0
    if (reason := fake_cuda.missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    if arguments[0] == "--write":
        write(Path(arguments[1]) if len(arguments) > 1 else None)
        return 0
    is_json = "--json" in arguments
    name, *overrides = (argument for argument in arguments if argument != "--json")
    for layout in (layout for layout in (*ALL, *MEASURING) if name in layout.name):
        report = trace(changed(layout, overrides))
        print(report.to_json() if is_json else described(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
