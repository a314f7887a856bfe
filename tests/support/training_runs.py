"""Tiny data sets, the training command line on a rank of a pool, and what a run has recorded."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def make_data(folder: Path, num_bytes: int = 200_000) -> Path:
    """Prepares a small part of the embedded corpus with a BPE of 512 tokens, the vocabulary of the debug preset."""
    from mlra_scale.data.mixture import Component
    from mlra_scale.data.options import PrepareOptions
    from mlra_scale.data.prepare import prepare
    from mlra_scale.data.sources import SourceName

    prepare(
        PrepareOptions(
            output=folder,
            components=[Component("", [SourceName("python-docs")])],
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
    """The environment of a training process: no launcher's variables, no GPU, no wandb unless wandb.mode is set."""
    dropped = ("WANDB", "NETRC", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "DS_ACCELERATOR")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    fixed = {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
        "WANDB_MODE": "disabled",
    }
    return {**clean, **fixed, **extra}


def metrics(run_directory: Path) -> list[dict[str, Any]]:
    """Returns the record of a run."""
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def events(run_directory: Path) -> list[dict[str, Any]]:
    """Returns the events of a run."""
    return [json.loads(line) for line in (run_directory / "events.jsonl").read_text().splitlines()]


def curve(run_directory: Path, name: str) -> dict[int, float]:
    """Returns one recorded number by step."""
    return {item["step"]: item[name] for item in metrics(run_directory) if name in item}
