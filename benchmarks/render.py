"""Prints the tables of reports that benchmarks wrote.

    python -m benchmarks.render docs/performance/*.json
    python -m benchmarks.render --figures docs/performance/*.json      also draws NAME.png beside each file

A figure has the spreads of a report's first table: a point for the median, a line for the quartiles.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Table, text_of


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the reports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description="Tables of benchmarks' reports.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="reports, as --json writes them")
    parser.add_argument("--figures", action="store_true", help="draw each report's figure beside its file")
    arguments = parser.parse_args(argv)
    for file in arguments.files:
        report = json.loads(file.read_text())
        print(f"{report['command']}  ({report['date']}, commit {report['commit']})")
        for table in report["tables"]:
            print(f"\n{text_of(Table(**table))}")
        print()
        if arguments.figures:
            draw(report, file.with_suffix(".png"))
    return 0


def draw(report: dict[str, Any], file: Path) -> None:
    """Draws the spreads of the first table that has any; a panel for each column of spreads."""
    from matplotlib.figure import Figure

    def has_spreads(table: dict[str, Any], column: int) -> bool:
        return any(isinstance(row[column], dict) for row in table["rows"])

    columns = [(t, c) for t in report["tables"] for c in range(len(t["headers"])) if has_spreads(t, c)]
    columns = [(table, column) for table, column in columns if table is columns[0][0]]
    if not columns:
        return
    rows = columns[0][0]["rows"]
    figure = Figure(figsize=(9.0, 0.9 + 0.26 * len(rows)), dpi=120, layout="constrained")
    for axes, (table, column) in zip(
        figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True
    ):
        for line, row in enumerate(rows):
            if isinstance(spread := row[column], dict):
                axes.plot([spread["lower"], spread["upper"]], [line, line], color="#0072b2", lw=3, alpha=0.5)
                axes.plot(spread["median"], line, "o", color="#111111", ms=4)
        axes.axvline(1.0, color="0.4", lw=0.8, ls="--")
        axes.set_yticks(range(len(rows)), [str(row[0]) for row in rows])
        axes.set_title(table["headers"][column], fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", color="0.9")
    figure.axes[0].invert_yaxis()
    figure.axes[0].set_ylabel(columns[0][0]["headers"][0], fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
