"""The steps of benchmarks/check.py that start training runs, stop them and resume them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.check import Task, Write
from benchmarks.harness import environment_of
from mlra_scale.training.record import read_record

ROOT = Path(__file__).resolve().parents[1]

VARIANTS = {
    "ZeRO 0": (),
    **{f"ZeRO {stage}": ("--ds-config", f"ds_configs/zero{stage}.json") for stage in (1, 2, 3)},
    "pipeline engine": ("--ds-config", "ds_configs/zero1_pipeline.json", "parallel.engine=pipeline"),
}
OFFLOAD = {"offload": ("--ds-config", "ds_configs/zero3_offload.json")}
EVERYTHING = (
    *("train.precision=bf16", "train.log_every=1", "optim.schedule=constant", "data.document_attention=masked"),
    *("tev.every=1", "gradients.every=2", "gradients.noise_every=2", "gradients.spectral_iterations=2"),
    *("activations.every=2", "qk_clip.threshold=100", "guard.enabled=true", "evaluation.every=3", "checkpoint.every=4"),
)
"""Everything that a run can measure and do, in its first steps."""
STEPS_OF_A_HALF = 5


def smoke(task: Task, write: Write) -> dict[str, Any]:
    """Versions; the debug preset with everything measured, stopped by a signal and resumed, under each engine."""
    environment = environment_of(task.device)
    lines = [f"{name}: {value}" for name, value in environment.items()]
    write({"holds": None, "lines": lines, "environment": environment})
    found = stopped_and_resumed(task, VARIANTS)
    return {**found, "lines": [*lines, *found["lines"]], "environment": environment}


def offload(task: Task, write: Write) -> dict[str, Any]:
    """As `smoke`, with the optimizer on the CPU, which DeepSpeed compiles at its first use."""
    return stopped_and_resumed(task, OFFLOAD)


def data_of(task: Task) -> Path:
    """Returns a small data set with the vocabulary of the debug preset; makes it if it is missing."""
    folder = Path(task.folder) / "data"
    if not folder.exists():
        words = ["--output", str(folder), "--train-bpe", "512", "--max-bytes", "200000", "--validation-fraction", "0.1"]
        subprocess.run([sys.executable, "tools/prepare_data.py", *words, "--workers", "1"], cwd=ROOT, check=True)
    return folder


def command_of(task: Task, run: Path, *arguments: str) -> list[str]:
    """Returns a training command of the debug preset."""
    words = ["--preset", "debug", "--run-dir", str(run), f"data.path={data_of(task)}"]
    words += [f"train.device={task.device}", "wandb.mode=disabled"]
    return [sys.executable, "-m", "mlra_scale.train", *words, *arguments]


def stopped_and_resumed(task: Task, variants: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Runs variants side by side, each stopped by SIGTERM and resumed; the record of its halves must have no gap."""
    data_of(task)  # once, before they run side by side
    with ThreadPoolExecutor(min(len(variants), len(os.sched_getaffinity(0)))) as pool:
        running = {name: pool.submit(_both_halves, task, name, words) for name, words in variants.items()}
        states = {name: each.result() for name, each in running.items()}
    lines = [f"{name + ':':18}{state}" for name, state in states.items()]
    return {"holds": all(state.startswith("trained") for state in states.values()), "lines": lines, "variants": states}


def _both_halves(task: Task, name: str, arguments: tuple[str, ...]) -> str:
    run = Path(task.folder) / "smoke" / name.replace(" ", "-")
    run.parent.mkdir(parents=True, exist_ok=True)
    for half in (1, 2):
        last = _last_step(run)
        words = (*arguments, *EVERYTHING, "train.steps=1000000", "--resume", "auto")
        with run.with_suffix(f".{half}.log").open("w") as log:
            process = subprocess.Popen(command_of(task, run, *words), cwd=ROOT, stdout=log, stderr=log)
            while process.poll() is None and _last_step(run) < last + STEPS_OF_A_HALF:
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            code = process.wait()
        if code != 5:
            lines = run.with_suffix(f".{half}.log").read_text().strip().splitlines()
            return f"half {half} ended with exit code {code} instead of 5: {lines[-1] if lines else 'no output'}"
    steps = [item["step"] for item in _losses(run)]
    if steps != list(range(1, len(steps) + 1)):
        return f"the record has the steps {steps}"
    return f"trained, stopped, resumed, stopped: steps 1 to {len(steps)}"


def _losses(run: Path) -> list[dict[str, Any]]:
    return [item for item in read_record(run / "metrics.jsonl") if "loss" in item]


def _last_step(run: Path) -> int:
    return max((item["step"] for item in _losses(run)), default=0)


def resume(task: Task, write: Write) -> dict[str, Any]:
    """A run, and two that resume from its middle: records and checkpoints must be equal bit by bit."""
    folder = Path(task.folder) / "resume"
    words = ["--ds-config", "ds_configs/zero1.json", "train.precision=bf16", "train.log_every=1", "train.steps=8"]
    words += ["checkpoint.every=4", "tev.every=1", "train.deterministic=true"]
    runs = {name: folder / name for name in ("whole", "first", "second")}
    branch = ("--resume", str(runs["whole"] / "checkpoints" / "step-00000004"))
    _train(command_of(task, runs["whole"], *words))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: _train(command_of(task, runs[name], *words, *branch)), ("first", "second")))
    compared = {}
    for name, other in (("first", "second"), ("first", "whole")):
        ends = [run / "checkpoints" / "step-00000008" for run in (runs[name], runs[other])]
        compared[f"{name} and {other}: records"] = _values(runs[name]) == _values(runs[other])
        compared[f"{name} and {other}: weights and moments"] = _same_tensors(*ends)
    lines = [f"{name}: {'equal' if is_equal else 'DIFFERENT'}" for name, is_equal in compared.items()]
    return {"holds": all(compared.values()), "lines": lines, "compared": compared}


def _train(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _values(run: Path) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "gradient_norm", "tev_mean", "tev_std")
    return [tuple(item.get(name) for name in names) for item in _losses(run) if item["step"] > 4]


def _same_tensors(first: Path, second: Path) -> bool:
    names = [sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors")) for folder in (first, second)]
    if names[0] != names[1] or not names[0]:
        return False
    for name in names[0]:
        with safe_open(first / name, "pt") as ours, safe_open(second / name, "pt") as theirs:
            if set(ours.keys()) != set(theirs.keys()):
                return False
            if not all(ours.get_tensor(key).equal(theirs.get_tensor(key)) for key in ours.keys()):  # noqa: SIM118
                return False
    return True
