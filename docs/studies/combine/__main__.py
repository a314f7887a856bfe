"""Names the rates of the second and third sweep of the study, and analyses all three.

    python -m docs.studies.combine choose runs/combine
    python -m docs.studies.combine report runs/combine runs/combine-rates runs/combine-depths [--output DIR]

Run in the root folder of the project. README.md is the protocol. `choose` writes rates.yaml and depths.yaml into the
folder of the screening; `report` writes combine.json, combine.md and the figures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from docs.studies.combine.analysis import report
from docs.studies.combine.sweeps import SweepError, choose
from mlra_scale.config import ConfigError
from mlra_scale.console import run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, or 2 if a sweep is not complete or cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.studies.combine",
        description="Sweeps and analysis of docs/studies/combine.yaml. Protocol: docs/studies/combine/README.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    choosing = commands.add_parser("choose", help="write the studies of the second and third sweep")
    choosing.add_argument("screening", type=Path, metavar="SCREENING", help="output folder of the screening")
    reporting = commands.add_parser("report", help="test the hypotheses")
    for name, what in (("screening", "screening"), ("rates", "second sweep"), ("depths", "third sweep")):
        reporting.add_argument(name, type=Path, metavar=name.upper(), help=f"output folder of the {what}")
    reporting.add_argument("--output", type=Path, default=Path("reports/combine"), metavar="DIR", help="where to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "choose":
            for file in choose(options.screening).values():
                print(f"python tools/sweep.py {file} --jobs 2")
            return 0
        report((options.screening, options.rates, options.depths), options.output)
    except (SweepError, ConfigError) as error:
        print(f"combine: error: {error}", file=sys.stderr)
        return 2
    print((options.output / "combine.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, has_side_effects=False))
