"""Where the time goes between the start of a run's process and the end of its first step.

`measure` starts this module in a process of its own; there the real entry point (mlra_scale.train) trains, while the
functions that make up its phases are timed, and the process ends after the first step.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from mlra_scale.config import Config

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300.0
PHASES = ("imports", "checks", "process groups", "data", "engine", "first step")
BARE = "import torch, deepspeed"


def measure(config: Config, data: Path, folder: Path, repeats: int) -> tuple[dict[str, list[float]], list[float]]:
    """Starts runs, one after another; a first one that does not count fills the file cache.

    Args:
        config: What is trained.
        data: A prepared data set.
        folder: For everything that the runs write.
        repeats: Runs that count.

    Returns:
        Seconds by phase and run ("rest": between the phases; "whole": all), and of processes that import torch and
        DeepSpeed and do nothing else.
    """
    file = folder / "config.yaml"
    file.write_text(config.to_yaml())
    found: dict[str, list[float]] = {name: [] for name in (*PHASES, "rest", "whole")}
    bare: list[float] = []
    for number in range(repeats + 1):
        marks = folder / f"marks-{number}.json"
        command = ["--config", str(file), "--run-dir", str(folder / f"run-{number}"), f"data.path={data}"]
        began = time.time()
        run([sys.executable, "-m", "benchmarks.start_up", repr(began), str(marks), *command, "wandb.mode=disabled"])
        seconds = json.loads(marks.read_text())
        began = time.perf_counter()
        run([sys.executable, "-c", BARE])
        if number > 0:
            bare.append(time.perf_counter() - began)
            for name, value in seconds.items():
                found[name].append(value)
    return found, bare


def run(command: Sequence[str]) -> None:
    """Runs a command to its end; one that fails ends the benchmark with what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")


class Phases:
    """Seconds spent in functions, by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def timed(self, owner: Any, name: str, phase: str, then: Callable[[], None] = lambda: None) -> Any:
        """Returns a patch: calls of a function count for a phase, and `then` is called after each."""
        function = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds[phase] += time.perf_counter() - began
            then()
            return result

        return mock.patch.object(owner, name, call)


def main(argv: Sequence[str]) -> int:
    """Trains one step.

    Args:
        argv: When the process was started (as of time.time), the file for the result, and arguments of the entry point.
    """
    began, marks = float(argv[0]), Path(argv[1])
    from mlra_scale import parallel, train
    from mlra_scale.parallel.engine import Engine
    from mlra_scale.training import start, trainer

    phases = Phases()
    phases.seconds["imports"] = time.time() - began

    def end() -> None:
        whole = time.time() - began
        rest = whole - sum(phases.seconds.values())
        marks.write_text(json.dumps({**phases.seconds, "rest": rest, "whole": whole}))
        sys.stdout.flush()
        os._exit(0)  # the run's own end would save a checkpoint

    with contextlib.ExitStack() as patches:
        for owner, name, phase in (
            (start, "prepare", "checks"),
            (parallel, "initialize_distributed", "process groups"),
            (parallel, "build_topology", "process groups"),
            (trainer, "open_datasets", "data"),
            (trainer, "build_engine", "engine"),
        ):
            patches.enter_context(phases.timed(owner, name, phase))
        patches.enter_context(phases.timed(Engine, "train_batch", "first step", end))
        return train.main(argv[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
