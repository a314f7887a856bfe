#!/usr/bin/env python
"""The command `mlra-scale sweep`, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlra_scale.cli.sweep import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.start(prog="sweep.py"))
