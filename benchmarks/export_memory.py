"""Anonymous memory that exporting and verifying a 1.5 B-parameter checkpoint takes.

    python -m benchmarks.export_memory [--quick] [--folder DIR] [--tokens N] [--dtype float32|bfloat16|float16]

A checkpoint of gpt2-xl's shape with MLRA and random weights is written, tensor by tensor (6.2 GB; an export takes as
much again). Then a process of its own checks its checksums, exports it and verifies the export, once per format, while
this one reads the other's RssAnon (memory that no file backs) every few milliseconds. Half of the runs read the
checkpoint as tensor-parallel ranks would have left it: no tensor in one piece, so that each is put together in memory.
Ends with 1 if a peak is not below 2 GB above what the interpreter needs with the same libraries loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.weights import write_weights
from mlra_scale.config import ModelConfig
from mlra_scale.model.parameters import ParameterTable

if TYPE_CHECKING:
    from mlra_scale.checkpoint.fragments import Part

LIMIT_BYTES = 2e9
SHAPE = {"num_layers": 48, "hidden_size": 1600, "num_heads": 25, "vocab_size": 50257, "max_positions": 1024}
TINY = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 500, "max_positions": 64}
SAMPLE_SECONDS = 0.01


class ShardedStore(Store):
    """A store none of whose tensors lies in one piece: the memory is that of a checkpoint of many ranks."""

    def tensor(self, name: str, part: Part = "weight") -> torch.Tensor:
        """See Store; always a new tensor."""
        return super().tensor(name, part).clone()

    def rows(self, name: str, first: int, stop: int, part: Part = "weight") -> torch.Tensor:
        """See Store; always a new tensor."""
        return super().rows(name, first, stop, part).clone()


def random_weights(model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights one after the other; nothing is zero or one by chance, but for padded vocabulary rows."""
    generator = torch.Generator().manual_seed(1)
    for name, info in ParameterTable(model).items():
        tensor = torch.empty(info.shape).normal_(std=0.02, generator=generator)
        if name.endswith("norm.weight"):
            tensor += 1.0
        if info.kind == "embedding":
            tensor[model.vocab_size :] = 0.0
        yield name, tensor


def anonymous_bytes(process: int | str = "self") -> int:
    """Returns the anonymous memory of a process; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def child(options: argparse.Namespace) -> None:
    """What is measured: checks, exports, verifies."""
    from mlra_scale.checkpoint.huggingface.exporting import DTYPES, ExportOptions, VerificationText, export_checkpoint

    loaded = anonymous_bytes()
    store = (ShardedStore if options.sharded else Store).open(options.folder / "checkpoint")
    assert not store.verify()
    length = min(options.tokens, store.model.max_positions)
    count = max(1, options.tokens // length)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(store.model.vocab_size, (count, length + 1), generator=generator)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = ExportOptions(options.child, DTYPES[options.dtype])
        text = VerificationText(tokens, "random tokens")
        figures = export_checkpoint(store, Path(folder) / "export", settings, text)
    assert figures is not None
    print(json.dumps({"loaded": loaded, "difference": figures.exported.max_difference, "bound": figures.max_bound}))


def measure(export_format: str, sharded: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the child and watches its memory."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.export_memory", "--child", export_format]
    command += ["--folder", str(options.folder), "--tokens", str(options.tokens), "--dtype", options.dtype]
    command += ["--sharded"] if sharded else []
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the export of {export_format} failed: {output}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found | {
        "format": export_format,
        "checkpoint": "of many ranks" if sharded else "in whole tensors",
        "peak": peak,
        "above": peak - found["loaded"],
        "seconds": time.monotonic() - began,
    }


def run(options: argparse.Namespace) -> bool:
    """Makes the checkpoint, measures every case, and prints a table."""
    model = ModelConfig.model_validate(TINY if options.quick else SHAPE)
    print(f"{model.num_parameters():,} parameters, {options.dtype}, verified on {options.tokens} tokens")
    began = time.monotonic()
    values, origin = model.model_dump(mode="json"), {"weights": "random"}
    store = Store.open(write_weights(options.folder / "checkpoint", values, random_weights(model), None, origin))
    size = store.manifest.total_bytes / 1e9
    print(f"checkpoint of {size:.2f} GB written in {time.monotonic() - began:.0f} s\n")
    print("| format | checkpoint | peak | libraries alone | above them | seconds | logits differ by (bound) |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    cases = [("gpt2", False), ("mlra", False), ("gpt2", True), ("mlra", True)]
    for export_format, sharded in cases[1:3] if options.quick else cases:
        row = measure(export_format, sharded, options)
        peak, loaded, above = (f"{row[name] / 1e6:,.0f} MB" for name in ("peak", "loaded", "above"))
        differs = f"{row['difference']:.1e} ({row['bound']:.1e})"
        cells = (export_format, row["checkpoint"], peak, loaded, above, f"{row['seconds']:.0f}", differs)
        print(f"| {' | '.join(cells)} |", flush=True)
        rows.append(row)
    is_low = all(row["above"] < LIMIT_BYTES for row in rows)
    print(f"\nevery peak is {'below' if is_low else 'NOT below'} {LIMIT_BYTES / 1e9:g} GB above the libraries")
    return is_low


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.export_memory", description="Anonymous memory of an export.")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two cases: shows that it runs")
    parser.add_argument("--folder", type=Path, help="where checkpoint and exports go (default: a temporary folder)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to verify on (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="written type")
    parser.add_argument("--child", choices=("gpt2", "mlra"), help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="export-memory-", dir=options.folder) as folder:
        options.folder = Path(folder)
        return 0 if run(options) else 1


if __name__ == "__main__":
    sys.exit(main())
