"""How far one update moves the product of two factors: AdamW, Muon and Spectron over a whole run.

    python -m docs.studies.update_norm [--output DIR] [--rates LR ...] [--jobs N] [--quick] [section.field=value ...]

Run in the root folder of the project; README.md says what is measured. Each optimizer and rate is a normal training run
in DIR/OPTIMIZER-lrRATE, whose engine is watched from outside: before and after every update all factors are read. A
finished run is not run again; the folder of one that was stopped must be removed first. Writes update_norm.json,
update_norm.md and update-norm.png into DIR.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from docs.studies.update_norm.report import OPTIMIZERS, report
from mlra_scale.console import run_tool
from mlra_scale.files import write_atomically

FIELDS = [
    "wandb.mode=disabled",
    "data.path=data/python-docs",
    "model.num_layers=48",
    "model.hidden_size=64",
    "model.max_positions=64",
    "train.steps=300",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.sequence_length=64",
    "train.log_every=1",
    "train.seed=11",
    "optim.warmup_steps=30",
    "evaluation.every=0",
    "checkpoint.every=0",
]
QUICK = ["model.num_layers=2", "train.steps=4", "optim.warmup_steps=1"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit code: 0, or that of the first run that failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--train"]:
        from docs.studies.update_norm.recorder import recorded
        from mlra_scale import train

        with recorded() as records:
            code = train.main(words[2:])
        if code == 0:  # the record of a run that was stopped is not complete
            write_atomically(Path(words[1]), "".join(json.dumps(record) + "\n" for record in records))
        return code
    parser = argparse.ArgumentParser(
        prog="python -m docs.studies.update_norm",
        description="Spectral norm of the update of low-rank products. docs/studies/update_norm/README.md explains it.",
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="default: runs/update_norm, with --quick runs/update_norm-quick")
    add("--rates", type=float, nargs="+", default=[3e-3, 1e-2], metavar="LR", help="learning rates (3e-3 and 1e-2)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--quick", action="store_true", help="two blocks, four steps: shows that it runs")
    add("fields", nargs="*", metavar="section.field=value", help="fields of all runs")
    options = parser.parse_intermixed_args(words)
    fields = [*FIELDS, *(QUICK if options.quick else []), *options.fields]
    output = options.output or Path("runs/update_norm-quick" if options.quick else "runs/update_norm")
    runs = [(optimizer, rate) for rate in options.rates for optimizer in OPTIMIZERS]
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda run: train_one(output, run[0], run[1], fields), runs))
    if any(codes):
        return next(code for code in codes if code)
    report(output, runs)
    print((output / "update_norm.md").read_text(encoding="utf-8"), end="")
    return 0


def train_one(output: Path, optimizer: str, rate: float, fields: Sequence[str]) -> int:
    """Trains and records one run, unless it is finished; returns its exit code."""
    from docs.studies.update_norm.report import file_of

    file = file_of(output, optimizer, rate)
    if file.exists():
        return 0
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "docs.studies.update_norm", "--train", str(file), "--preset", "laptop"]
    command += ["--run-dir", str(file.parent), *fields, f"optim.name={optimizer}", f"optim.lr={rate}"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (file.parent / "output.log").open("wb") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        print(f"update_norm: {optimizer} at {rate:g} ended with exit code {code}: see {log.name}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run_tool(main, has_side_effects=False))
