"""Runs the training command line on a tiny data set: in a pool's workers, or in processes of its own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def make_data(folder: Path, num_bytes: int = 200_000) -> Path:
    """Prepares a small part of the embedded corpus with a BPE of 512 tokens, the vocabulary of the debug preset."""
    from mlra_scale.data.prepare import PrepareOptions, prepare

    prepare(
        PrepareOptions(
            output=folder,
            sources=["python-docs"],
            train_bpe=512,
            max_bytes=num_bytes,
            validation_fraction=0.1,
            workers=1,
            progress=False,
        )
    )
    return folder


def write_megatron_data(prefix: Path, num_documents: int = 40) -> Path:
    """Writes a data set with Megatron's own builder: documents that count, from a random token on."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(num_documents):
        length = int(generator.integers(50, 300))
        builder.add_document((generator.integers(512) + np.arange(length)) % 512, [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


@dataclass(frozen=True)
class Finished:
    """What a training command did."""

    code: int
    stdout: str
    stderr: str


Start = Callable[..., Finished]


def base_command(run: Path, data: Path, *arguments: str) -> list[str]:
    """The command line for a short run of the debug preset that logs every step."""
    source = [] if any(part.startswith("data.") for part in arguments) else [f"data.path={data}"]
    return ["--preset", "debug", "--run-dir", str(run), *source, "train.log_every=1", *arguments]


def main_on_rank(rank: int, world_size: int, arguments: tuple[str, ...]) -> Finished:
    """Runs the command line on one rank of a worker pool: the real thing, without the seconds that starting takes."""
    from mlra_scale.train import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return Finished(code, out.getvalue(), err.getvalue())


def environment(**extra: str) -> dict[str, str]:
    """The environment of a training process: no launcher's variables, no GPU, no key, no home."""
    dropped = ("WANDB", "NETRC", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "DS_ACCELERATOR")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    fixed = {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
    }
    return {**clean, **fixed, **extra}


def train(*arguments: str, num_processes: int = 1, timeout: float = 180.0, **extra: str) -> Finished:
    """Runs `mlra_scale.train` with these arguments and waits for its end.

    Args:
        arguments: Of the command line.
        num_processes: 1: plain python; more: torchrun.
        timeout: Seconds until everything that was started is killed and the test fails.
        extra: Further environment variables.

    Returns:
        Exit code (that of torchrun is 1 whatever the workers' is) and output.
    """
    module = ["-m", "mlra_scale.train", *arguments]
    command = [sys.executable, *module]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [sys.executable, *launcher, f"--nproc_per_node={num_processes}", *module]
    process = subprocess.Popen(
        command,
        env=environment(**extra),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        # The whole session: the launcher and its workers.
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        print(stdout[-3000:], stderr[-3000:], sep="\n--- stderr ---\n")
        raise
    return Finished(process.returncode, stdout, stderr)


def metrics(run_directory: Path) -> list[dict[str, Any]]:
    """Returns the record of a run."""
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def events(run_directory: Path) -> list[dict[str, Any]]:
    """Returns the events of a run."""
    return [json.loads(line) for line in (run_directory / "events.jsonl").read_text().splitlines()]


def curve(run_directory: Path, name: str) -> dict[int, float]:
    """Returns one recorded number by step."""
    return {item["step"]: item[name] for item in metrics(run_directory) if name in item}
