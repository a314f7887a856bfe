#!/usr/bin/env python
"""Asks of a sweep whether anything warned of its spikes and divergences: python tools/predict.py --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXAMPLES = """examples:
  python tools/predict.py runs/predict
  python tools/predict.py runs/predict --output reports/predict

exit codes: 0; 2 the sweep cannot be read
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="predict.py",
        description="ROC areas, with intervals from runs drawn anew, and lead times of TEV and of other signals before "
        "spikes and divergences, matched for step and learning rate. What and why: docs/studies/predict.md.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("folder", type=Path, metavar="FOLDER", help="output folder of tools/sweep.py")
    add("--output", type=Path, metavar="DIR", help="where prediction.json and prediction.md go (default: FOLDER)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 for a sweep that cannot be read."""
    options = parser().parse_args(arguments)
    from mlra_scale.study.prediction.analysis import predict
    from mlra_scale.study.prediction.runs import PredictionError

    output = options.output or options.folder
    try:
        predict(options.folder, output)
    except PredictionError as error:
        print(f"predict: error: {error}", file=sys.stderr)
        return 2
    print((output / "prediction.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=False))
