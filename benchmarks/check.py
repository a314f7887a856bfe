"""Ten minutes on a GPU, or on the nodes of a Slurm job: agreement, speed, and how far the plan is right.

    python -m benchmarks.check [--minutes M] [--steps NAME ...] [--output FOLDER] [--preset NAME] [train.seed=9 ...]
    sbatch slurm/check.sh [the same]
    python -m benchmarks.check --device cpu --quick        the same code at a tiny size

The steps of STEPS run one after another, the most useful first. Each has processes, a log (FOLDER/NAME.log) and a
time-out of its own, and its result is written at once (FOLDER/NAME.json): a step that fails or is not done in time does
not stop the next one, and the parts that it has finished are kept. When the minutes are over, the remaining steps are
reported as not run.

What the cluster can do is written to FOLDER/cluster.json as soon as it is known, for `tools/plan.py --cluster-file` and
`cluster.file`.

A step's result has `holds` (whether what was compared agrees; null: nothing was compared), `lines` (its text), and the
numbers themselves.

Exit code: 0 if everything that was compared agrees and nothing failed; 1 otherwise; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.processes import CommandFailed, end_on_sigterm, run_command
from mlra_scale.cluster.channel import free_port
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.cluster.slurm import Allocation, address, slurm_environment, step_command
from mlra_scale.config import ConfigError
from mlra_scale.files import write_atomically
from mlra_scale.planning.cluster import Cluster, named_cluster
from mlra_scale.planning.cluster_file import write_cluster_file

Write = Callable[[dict[str, Any]], None]
"""Writes a step's result; steps of several parts call it after each."""
FEWEST_SECONDS = 15.0
"""No step is started when less is left: its imports alone take that long."""


@dataclass(frozen=True)
class Step:
    """A part of the check.

    Attributes:
        name: Its name.
        seconds: Its time-out in a check of ten minutes; it grows and shrinks with the minutes.
        function: The function of this folder that its processes call with (Task, Write), as module.name.
        on: "one": one process on this node. "all": a process for each rank of all nodes.
        needs: "", "gpu" or "ranks" (several): without them the step is left out.
    """

    name: str
    seconds: float
    function: str
    on: str = "one"
    needs: str = ""


STEPS = (
    Step("parity", 120, "parity.parity"),
    Step("smoke", 120, "check_steps.smoke"),
    Step("links", 60, "calibration.links", "all", "ranks"),
    Step("rates", 60, "calibration.rates", "all"),
    Step("training", 150, "check_ranks.training", "all"),
    Step("synchronizations", 60, "check_ranks.synchronizations", needs="gpu"),
    Step("alone", 60, "check_ranks.alone"),
    Step("layouts", 120, "check_ranks.layouts", "all"),
    Step("72 layers", 240, "gpu.deep", needs="gpu"),
    Step("resume", 60, "check_steps.resume"),
    Step("gpt2-xl", 180, "gpu.xl", needs="gpu"),
    Step("offload", 180, "check_steps.offload", needs="gpu"),
    Step("profile", 60, "check_ranks.profile", needs="gpu"),
)
NAMES = tuple(step.name for step in STEPS)


@dataclass(frozen=True)
class Task:
    """The arguments of a step's processes.

    Attributes:
        device: "cpu" or "cuda".
        devices_per_node: Ranks on a node.
        world_size: Ranks on all nodes.
        folder: Results of all steps; a step may put more there.
        preset: The model whose plan is compared.
        overrides: Fields of it.
        is_quick: Whether sizes are tiny, to see that it runs.
        seconds: Time-out of the step.
    """

    device: str
    devices_per_node: int
    world_size: int
    folder: str
    preset: str
    overrides: tuple[str, ...]
    is_quick: bool
    seconds: float

    def result_of(self, step: str) -> dict[str, Any]:
        """Returns the result of a step; empty if it has none."""
        path = self.file_of(step, "json")
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def file_of(self, step: str, ending: str) -> Path:
        """Returns a file of a step."""
        return Path(self.folder) / f"{step.replace(' ', '-')}.{ending}"


class Check:
    """Runs steps, and keeps the measured cluster.

    Args:
        task: The arguments of all steps.
        settings: Of the launcher: the interpreter, more arguments of srun.
        allocation: Of the Slurm job; None outside of one, where all ranks are on this machine.
    """

    def __init__(self, task: Task, settings: LauncherSettings, allocation: Allocation | None) -> None:
        self.task, self._settings, self._allocation = task, settings, allocation
        self.folder = Path(task.folder)
        self.cluster: Cluster | None = None
        self._measured: set[str] = set()

    def run(self, steps: Sequence[Step], minutes: float) -> bool:
        """Runs steps; returns whether nothing failed or differs."""
        begin, states = time.monotonic(), {}
        for step in steps:
            left = 60.0 * minutes - (time.monotonic() - begin)
            started = time.monotonic()
            states[step.name] = self._run_one(step, min(left, step.seconds * minutes / 10.0), left)
            found = self.task.result_of(step.name)
            self._note_constants(found.get("constants", {}), found.get("base"))
            lines = [f"    {line}" for line in found.get("lines", [])]
            print(
                "\n".join([f"{step.name}: {states[step.name]} ({time.monotonic() - started:.0f} s)", *lines]),
                flush=True,
            )
            summary = {"task": asdict(self.task), "states": states}
            write_atomically(self.folder / "check.json", json.dumps(summary, indent=2) + "\n")
        return all(state.startswith(("agrees", "measured", "left out", "not run")) for state in states.values())

    def _run_one(self, step: Step, seconds: float, left: float) -> str:
        task = replace(self.task, seconds=seconds)
        if step.needs == "gpu" and task.device != "cuda":
            return "left out: needs a GPU"
        if step.needs == "ranks" and task.world_size == 1:
            return "left out: needs several ranks"
        if left < FEWEST_SECONDS:
            return "not run: the minutes are over"
        file = task.file_of(step.name, "json")
        file.unlink(missing_ok=True)
        command, environment = self._command(step.on, [step.name, json.dumps(asdict(task))])
        try:
            run_command(step.name, command, environment, seconds, task.file_of(step.name, "log"))
        except CommandFailed as error:
            return f"failed: {error.last_line}" + (" (a part of its result is there)" if file.exists() else "")
        found = self.task.result_of(step.name)
        if not found:
            return "failed: it wrote no result"
        return {None: "measured", True: "agrees", False: "DIFFERS"}[found.get("holds")]

    def _command(self, on: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
        """Returns the command of a step's processes, and their environment."""
        job, settings, ranks = self._allocation, self._settings, self.task.devices_per_node
        own = {"DS_ACCELERATOR": self.task.device}
        if on == "all":
            own["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as a job's ranks have it, before CUDA begins
        program = ["-u", "-m", "benchmarks.check", "--child", *arguments]
        if job is not None:
            nodes, ranks = (job.nodes, ranks) if on == "all" else ((job.here,), 1)
            if on == "all":
                own |= {"MASTER_ADDR": address(nodes[0]), "MASTER_PORT": str(free_port())}
            options = [f"--ntasks={len(nodes) * ranks}", f"--ntasks-per-node={ranks}", "--distribution=block"]
            options += ["--kill-on-bad-exit=1", "--unbuffered", *settings.srun]
            words = [*step_command(nodes, "0", "none", options), *settings.python, *program]
            return words, slurm_environment(os.environ) | own
        if on == "all" and ranks > 1:
            program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program[1:]]
        return [*settings.python, *program], {**os.environ, **own}

    def _note_constants(self, constants: dict[str, Any], base: dict[str, Any] | None) -> None:
        """Writes the file of the cluster again, with the constants that a step has measured."""
        if self.cluster is None and base is not None:
            named = named_cluster(base.pop("name"))
            self.cluster = replace(named, name=f"{named.name}, measured", **base)
        if self.cluster is None or not constants:
            return
        self._measured |= set(constants)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in constants.items()
        }
        self.cluster = replace(self.cluster, **values)
        write_cluster_file(self.folder / "cluster.json", self.cluster, self._measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, or, after --child, one process of a step."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--child"]:
        return child(words[1], Task(**json.loads(words[2])))
    parser = argparse.ArgumentParser(
        prog="benchmarks.check", description="Agreement, speed and memory of a GPU or a cluster, in ten minutes."
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="for everything (default: 10)")
    parser.add_argument("--steps", nargs="+", choices=NAMES, metavar="NAME", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--output", type=Path, default=Path("runs/check"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("--preset", help="what is trained where the plan is compared (default: gpt2-mlra-72l)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--processes", type=int, metavar="N", help="ranks on a node (default: its GPUs, or 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields of the preset")
    arguments = parser.parse_intermixed_args(words)
    if not 0.0 < arguments.minutes < math.inf:
        parser.error(f"--minutes {arguments.minutes:g}: a number above 0")
    if arguments.processes is not None and arguments.processes < 1:
        parser.error(f"--processes {arguments.processes}: at least 1")
    try:
        settings = LauncherSettings.of(os.environ)
        allocation = Allocation.of(os.environ) if "SLURM_JOB_ID" in os.environ else None
    except ConfigError as error:
        parser.error(error.in_one_line)
    folder = arguments.output.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {folder}: cannot be made ({error.strerror}); name another folder")
    processes = arguments.processes or settings.processes
    task = Task(
        device=arguments.device or settings.device,
        devices_per_node=processes,
        world_size=processes * (1 if allocation is None else len(allocation.nodes)),
        folder=str(folder),
        preset=arguments.preset or ("debug" if arguments.quick else "gpt2-mlra-72l"),
        overrides=tuple(arguments.overrides),
        is_quick=arguments.quick,
        seconds=0.0,
    )
    print(f"{task.world_size} rank(s), {task.device}, {arguments.minutes:g} minutes; results: {folder}", flush=True)
    check = Check(task, settings, allocation)
    is_good = check.run([step for step in STEPS if step.name in (arguments.steps or NAMES)], arguments.minutes)
    if check.cluster is not None:
        print(f"constants of the cluster: {folder / 'cluster.json'} (tools/plan.py --cluster-file, docs/planning.md)")
    return int(not is_good)


def child(name: str, task: Task) -> int:
    """Runs one process of a step; rank 0 writes the result."""
    step = next(step for step in STEPS if step.name == name)
    if step.on == "all" and "SLURM_STEP_ID" in os.environ:
        for variable, slurms in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "NTASKS")):
            os.environ[variable] = os.environ[f"SLURM_{slurms}"]
    module, function = step.function.split(".")

    def write(found: dict[str, Any]) -> None:
        if os.environ.get("RANK", "0") == "0":
            write_atomically(task.file_of(name, "json"), json.dumps(found, indent=2) + "\n")

    run = getattr(import_module(f"benchmarks.{module}"), function)
    write(run(replace(task, overrides=tuple(task.overrides)), write))
    return 0


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
