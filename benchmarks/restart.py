"""How soon a training steps: from the start of its process, and after the death of a rank or of a node of a job.

    python -m benchmarks.restart [--quick] [--rounds 3] [--json FILE]

The first table is one process of the debug preset with random batches of 512 tokens, against a process that imports
torch and DeepSpeed and nothing else; the two take turns. Time is taken from outside and, beside busy neighbours, as
the CPU time of the process. The second is a cluster job of two nodes with one rank each. Both nodes are this machine:
srun and scontrol are stand-ins, which start one process per node and answer at once, so that the scheduler of a real
cluster is not in these times. Rank 1 is killed; after the next checkpoint all processes of the second node are killed,
and the job continues on the first (cluster.elastic). Both are done with and without spare ranks (cluster.spares). A
time begins with the kill and ends when the job hears that a rank has begun a step; it hears of its ranks each second.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Report, Table, median_of, parse, parser_of, ratios, rotated
from mlra_scale.process_tree import descendants, kill_with_descendants
from mlra_scale.training.record import read_record

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300.0
PHASES = ("imports and checks", "process groups", "engine, record", "first step")

BARE = "import torch, deepspeed, time; print('mark', time.process_time(), flush=True)"
TRAINING = """
import gc, os, time
gc.disable()  # as the program's main module does
from mlra_scale import train
from mlra_scale.training.interruption import Watchdog
class Marks(Watchdog):
    def heartbeat(self, phase, step):
        if phase != "evaluating":
            print("mark", time.process_time(), flush=True)
        if (phase, step) == ("training", 2):
            os._exit(0)
import sys
sys.exit(train.main(sys.argv[1:], Marks()))
"""
SRUN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys
first = next(place for place, word in enumerate(sys.argv) if place > 0 and not word.startswith("-"))
nodes = next(word for word in sys.argv if word.startswith("--nodelist=")).partition("=")[2].split(",")
tasks = [
    subprocess.Popen(sys.argv[first:], env=os.environ | {{"SLURMD_NODENAME": node, "SLURM_PROCID": str(number)}})
    for number, node in enumerate(nodes)
]
signal.signal(signal.SIGTERM, lambda number, frame: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$*" in
*"show hostnames"*) printf 'a\\nb\\n' ;;
*"show node"*) echo NodeAddr=127.0.0.1 ;;
*"show job"*) echo JobState=RUNNING Restarts=0 ;;
*) exit 1 ;;
esac
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    arguments = parse(
        parser_of("benchmarks.restart", "Start and restart of a training on CPUs.", 3, has_device=False), argv
    )
    report = Report.begin(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        starts = measure_starts(folder, arguments.rounds)
        restarts = measure_restarts(folder, arguments.rounds)
    report.numbers = {"starts": starts, "restarts": restarts}
    for table in (*tables_of_starts(starts), *tables_of_restarts(restarts)):
        report.add(table)
    report.write(arguments.json)
    return 0


def write_data(folder: Path) -> None:
    """Prepares a data set with the vocabulary of the debug preset, and the stand-ins of Slurm's commands."""
    words = ["--output", str(folder / "data"), "--train-bpe", "512", "--max-bytes", "200000", "--workers", "1"]
    subprocess.run(
        [sys.executable, "tools/prepare_data.py", *words, "--validation-fraction", "0.1"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment of all processes: one thread each, no wandb, no GPU."""
    return os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }


def words_of(folder: Path, run: Path, *more: str) -> list[str]:
    """Returns the arguments of a training of the debug preset."""
    words = ["--preset", "debug", "--run-dir", str(run), f"data.path={folder / 'data'}", "train.device=cpu"]
    return [*words, "wandb.mode=disabled", *more]


def measure_starts(folder: Path, rounds: int) -> dict[str, list[list[tuple[float, float]]]]:
    """Returns for each contender and round its marks: seconds since the start of the process, and CPU seconds."""
    found: dict[str, list[list[tuple[float, float]]]] = {"bare": [], "training": []}
    marks_of(folder, BARE, [])  # the libraries come from the disk's cache afterwards
    for turn in range(rounds):
        for name in rotated(("bare", "training"), turn):
            words = words_of(folder, folder / f"start-{turn}", "train.steps=3") if name == "training" else []
            found[name].append(marks_of(folder, TRAINING if name == "training" else BARE, words))
    return found


def marks_of(folder: Path, code: str, words: Sequence[str]) -> list[tuple[float, float]]:
    """Runs Python code that prints marks; returns when each came, and the CPU time that it gives."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [(time.perf_counter() - began, line.split()) for line in process.stdout]
    if process.returncode != 0:
        raise SystemExit(f"failed with exit code {process.returncode}")
    return [(seconds, float(line[1])) for seconds, line in lines if line[:1] == ["mark"]]


class Job:
    """A job on the two nodes, in a folder of its own."""

    def __init__(self, folder: Path, run: Path, has_spares: bool) -> None:
        self.run = run
        slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n", "SLURMD_NODENAME": "a", "PROCESSES_PER_NODE": "1"}
        words = words_of(folder, run, "train.steps=1000000", "--resume", "auto", "optim.schedule=constant")
        words += ["train.global_batch_size=8", "train.micro_batch_size=4", "train.log_every=1", "checkpoint.every=10"]
        words += ["evaluation.every=0", "cluster.elastic=true", f"cluster.spares={json.dumps(has_spares)}"]
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "mlra_scale.cluster.job", *words],
            cwd=ROOT,
            env=environment(folder) | slurm,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds; ends the program where the job ends before, or it takes too long."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not holds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the job did not come so far:\n{self.console()[-4000:]}")
            time.sleep(0.05)

    def console(self) -> str:
        """What the job has printed."""
        with contextlib.suppress(FileNotFoundError):
            return (self.run / "logs" / "console.log").read_text(errors="replace")
        return ""

    def begun(self, attempt: int) -> float:
        """Waits until ranks of an attempt have begun a step; returns when, in seconds since the epoch."""
        text = f"attempt {attempt}: training since"
        self.wait_until(lambda: text in self.console())
        line = next(line for line in self.console().splitlines() if text in line)
        return datetime.fromisoformat(line[5 : line.index("]")]).timestamp()

    def wait_for_checkpoint(self, since: float) -> None:
        """Waits for a checkpoint that was complete at least a second after a time."""

        def is_there() -> bool:
            events = [event for event in read_record(self.run / "events.jsonl") if event["event"] == "checkpoint"]
            return any(datetime.fromisoformat(event["time"]).timestamp() > since + 1 for event in events)

        self.wait_until(is_there)

    def processes(self, **variables: str) -> Iterator[psutil.Process]:
        """Yields the processes below the job's own that have these variables in their environment."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.environ().items() >= variables.items():
                    yield process

    def kill(self, **variables: str) -> float:
        """Kills these processes; returns when."""
        processes = list(self.processes(**variables))
        assert processes, variables
        now = time.time()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        return now


def measure_restarts(folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Returns the seconds of a first start and after both deaths, for jobs without and with spares, by round."""
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for turn in range(rounds):
        for name in rotated(("without", "with"), turn):
            job = Job(folder, folder / f"job-{name}-{turn}", name == "with")
            try:
                found[name].append(deaths(job, name == "with"))
            finally:
                kill_with_descendants(job.process)
                job.process.wait()
    return found


def deaths(job: Job, has_spares: bool) -> dict[str, float]:
    """Kills a rank and then a node of a job; returns the seconds until the first new step of each, and of the start."""
    seconds = {}

    def wait_until_calm(number: int) -> None:
        begun = job.begun(number)
        job.wait_for_checkpoint(begun)
        if has_spares:
            job.wait_until(lambda: job.console().count("spare ranks have loaded") == number)

    seconds["start"] = job.begun(1) - datetime.fromisoformat(first_time(job.console())).timestamp()
    wait_until_calm(1)
    logs = str(job.run / "logs" / "attempt-001")
    killed = job.kill(RANK="1", MLRA_SCALE_LOGS=logs)
    seconds["rank"] = job.begun(2) - killed
    wait_until_calm(2)
    killed = job.kill(SLURMD_NODENAME="b", SLURM_PROCID="1")
    seconds["node"] = job.begun(3) - killed
    return seconds


def first_time(console: str) -> str:
    """Returns the time of the job's first line."""
    line = next(line for line in console.splitlines() if line.startswith("[job "))
    return line[5 : line.index("]")]


def tables_of_starts(found: dict[str, list[list[tuple[float, float]]]]) -> list[Table]:
    """Returns the tables of a start: its phases, and ratios to the bare imports."""
    rows: list[list[Any]] = []
    for number, phase in enumerate(PHASES):
        spent = [
            [marks[number][kind] - (marks[number - 1][kind] if number else 0.0) for marks in found["training"]]
            for kind in (0, 1)
        ]
        rows.append([phase, *map(median_of, spent)])
    ends = {name: [[marks[-1][kind] for marks in found[name]] for kind in (0, 1)] for name in found}
    rows.append(["whole", *map(median_of, ends["training"])])
    rows.append(["import torch, deepspeed", *map(median_of, ends["bare"])])
    compared: list[list[Any]] = [
        [
            "whole / import torch, deepspeed",
            *(ratios(*both) for both in zip(ends["training"], ends["bare"], strict=True)),
        ]
    ]
    return [
        Table(f"start of one process, debug preset; medians of {len(found['bare'])} rounds", ["", "s", "CPU s"], rows),
        Table("start", ["", "ratio of times", "ratio of CPU times"], compared),
    ]


def tables_of_restarts(found: dict[str, list[dict[str, float]]]) -> list[Table]:
    """Returns the tables of a job: seconds to the first step, and what spares make of them."""
    titles = {"start": "start of the job", "rank": "death of a rank", "node": "death of a node"}
    seconds = {key: [[each[key] for each in found[name]] for name in ("without", "with")] for key in titles}
    rows: list[list[Any]] = [
        [title, *(statistics.median(values) for values in seconds[key]), ratios(*reversed(seconds[key]))]
        for key, title in titles.items()
    ]
    headers = ["until the first step", "s", "s with spares", "ratio"]
    return [Table("job of two nodes with one rank each, debug preset", headers, rows)]


if __name__ == "__main__":
    sys.exit(main())
