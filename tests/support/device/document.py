"""The tables of docs/device.md: what each layout does, and where the host waits with a reason each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.support.device import expected
from tests.support.device.checks import GROUPS
from tests.support.device.report import Report

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "device.md"
BEGIN, END = "<!-- {} -->\n", "<!-- end of {} -->\n"
MIB, GIB = 2.0**20, 2.0**30
HEADER = (
    "layout",
    "peak, GiB",
    "planned",
    "sent, GiB: tensor",
    "pipeline",
    "data",
    "planned",
    "waits per step",
    "kernels per block",
    "ceiling",
)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def row_of(report: Report) -> list[str]:
    """The row of a layout."""
    step, planned = report.step, report.planned_sent
    sent = {kind: step.sent(group) for kind, group in GROUPS.items()}
    ends = ("pipeline", "tied")
    return [
        report.layout,
        f"{step.peak / GIB:.3f}",
        f"{report.planned_bytes / GIB:.3f}",
        f"{sent['tensor'] / GIB:.3f}",
        f"{sum(sent[kind] for kind in ends) / GIB:.3f}",
        f"{sent['data'] / GIB:.3f}",
        f"{planned['tensor'] / GIB:.3f}, {sum(planned[kind] for kind in ends) / GIB:.3f}, {planned['data'] / GIB:.3f}",
        str(step.num_waits) + (f", flow control {step.num_flow_control}" if step.num_flow_control else ""),
        f"{report.launches_per_block:.1f}",
        f"{expected.LAUNCHES.get(report.layout, 0):g}",
    ]


def layouts_table(reports: Iterable[Report]) -> str:
    """The table of layouts."""
    return _table(HEADER, [row_of(report) for report in reports])


def matrices_table(reports: Iterable[Report]) -> str:
    """The table of what muon and spectron do in a step; bytes of the traced rank, of the mean rank, and planned."""
    header = (
        *("layout", "matrices", "kernels", "planned", "messages", "planned"),
        *("sent, MiB", "mean rank", "planned", "memory, MiB", "planned"),
    )
    rows = []
    for report in reports:
        if (of := report.matrices) is not None:
            numbers = [of.number, of.num_launches, of.planned_launches, report.step.of_matrices.number]
            sent = [report.step.of_matrices.sent, of.mean_sent, of.planned_sent, of.added, of.planned_added]
            cells = [f"{number:.0f}" for number in (*numbers, of.planned_messages)]
            rows.append([report.layout, *cells, *(f"{each / MIB:.2f}" for each in sent)])
    return _table(header, rows)


def waits_table() -> str:
    """The table of the places where the host waits in a step of training."""
    header = ("kind", "where", "per step, at most", "why")
    return _table(header, [[wait.kind, f"`{wait.site}`", str(wait.number), wait.reason] for wait in expected.WAITS])


def flow_control_table() -> str:
    """The table of the places where the host waits if it is too far ahead."""
    header = ("kind", "where", "per parameter and micro-batch, at most", "why")
    rows = [[wait.kind, f"`{wait.site}`", str(wait.number), wait.reason] for wait in expected.FLOW_CONTROL]
    return _table(header, rows)


def measured_table() -> str:
    """The table of the places where the host waits in what is measured and saved."""
    header = ("what", "kind", "where", "times, at most", "why")
    return _table(
        header,
        [
            [name, wait.kind, f"`{wait.site}`", str(wait.number), wait.reason]
            for name, waits in expected.MEASURED_WAITS.items()
            if waits is not expected.WAITS
            for wait in waits
        ],
    )


def written(name: str) -> str:
    """A table as it stands in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = BEGIN.format(name), END.format(name)
    return text[text.index(begin) + len(begin) : text.index(end)]


def write(name: str, table: str) -> None:
    """Puts a table into the document."""
    begin, end = BEGIN.format(name), END.format(name)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.replace(begin + written(name) + end, begin + table + end), encoding="utf-8")
