"""Tests whether a signal of a sweep's runs precedes their loss spikes and divergences.

    python -m docs.studies.predict runs/predict [--output DIR]

Run in the root folder of the project. Writes prediction.json and prediction.md; README.md is the protocol.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from docs.studies.predict.analysis import predict
from docs.studies.predict.runs import PredictionError
from mlra_scale.console import run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis; returns the exit code: 0, or 2 if the sweep cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.studies.predict",
        description="ROC areas with bootstrap intervals over runs, and lead times, of TEV and of other signals before "
        "loss spikes and divergences, matched for step and learning rate. Protocol: docs/studies/predict/README.md.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of tools/sweep.py")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: FOLDER)")
    options = parser.parse_args(arguments)
    output = options.output or options.folder
    try:
        predict(options.folder, output)
    except PredictionError as error:
        print(f"predict: error: {error}", file=sys.stderr)
        return 2
    print((output / "prediction.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, has_side_effects=False))
