"""Finds the best learning rate of each depth in the sweep of docs/studies/completep.yaml.

    python -m docs.studies.completep runs/completep [--output DIR]

Run in the root folder of the project. Writes completep.json, completep.md and a figure; README.md is the protocol.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from docs.studies.completep.analysis import SweepError, report
from mlra_scale.console import run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis; returns the exit code: 0, or 2 if the sweep cannot be analysed."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.studies.completep",
        description="Best learning rates over depth, with intervals. Protocol: docs/studies/completep/README.md.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of tools/sweep.py")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: FOLDER)")
    options = parser.parse_args(arguments)
    output = options.output or options.folder
    try:
        report(options.folder, output)
    except SweepError as error:
        print(f"completep: error: {error}", file=sys.stderr)
        return 2
    print((output / "completep.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, has_side_effects=False))
