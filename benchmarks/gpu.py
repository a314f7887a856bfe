"""One device: MFU of our trainer and of others in bf16: the steps `72 layers` and `gpt2-xl` of benchmarks/check.py.

    python -m benchmarks.gpu [options of benchmarks.check]      these two steps, after `parity`

For 72 layers of width 1024 and for gpt2-xl: our trainer under ZeRO 1, dense and MLRA at R = D/2, plain PyTorch and
transformers' GPT2LMHeadModel, each compiled and not, one after another, each in a process of its own with the whole
device. All have a vocabulary of 50304, so that none pays for an odd number of columns. A contender that fails (memory
too small, a compiler error, not done in time) is reported with its reason, and the result is written after each.
Contenders do not run at the same time, so rounds are not paired: a ratio is that of the medians. Plain PyTorch runs
twice, and its ratio to itself is the noise. Dense contenders start from the same weights and tokens; one whose first
loss differs from plain PyTorch's has no ratio. MFU is ModelConfig.flops_per_token (factors counted once, no
recomputation) times tokens/s over the best rate of square matrix products in the same run, so it does not depend on a
data sheet. The aim is 50 % or better.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from benchmarks import check
from benchmarks.check import Task, Write
from benchmarks.contenders import (
    AGAIN,
    COMPILED,
    DENSE,
    MLRA,
    OURS,
    PLAIN,
    TINY,
    TRANSFORMERS,
    Shape,
    build,
    config_for,
    draw_weights,
    kind_of,
    one_process_mesh,
)
from benchmarks.harness import Table, median_of, now, seconds_of, text_of
from benchmarks.processes import end_on_sigterm, error_line
from benchmarks.ranks import RanksFailed, alone
from benchmarks.step_time import TOLERANCE
from benchmarks.tensor_memory import start
from mlra_scale.config import Config, batch_plan
from mlra_scale.planning.memory import rank_memory

VOCAB = 50304
MODELS = {
    "72 layers": Shape("72 layers", 72, 1024, 16, batch_size=8, sequence_length=1024, vocab_size=VOCAB),
    "gpt2-xl": Shape("gpt2-xl", 48, 1600, 25, batch_size=8, sequence_length=1024, vocab_size=VOCAB),
}
FIRST = (MLRA[2], PLAIN, DENSE)
NAMES = (
    *FIRST,
    *(kind + COMPILED for kind in FIRST),
    TRANSFORMERS,
    TRANSFORMERS + COMPILED,
    PLAIN + AGAIN,
)
"""By worth: with few minutes the first ones are measured."""
PRECISION, ROUNDS, STEPS_PER_ROUND, PRODUCTS = "bf16", 3, 3, (4096, 8192, 16384)
FEWEST_SECONDS = 20.0
"""No contender is started when less is left: it would only import its libraries."""
ZERO1 = Path(__file__).resolve().parents[1] / "ds_configs" / "zero1.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps of a single device."""
    return check.main([*(sys.argv[1:] if argv is None else argv), "--steps", "parity", *MODELS])


def deep(task: Task, write: Write) -> dict[str, Any]:
    """The contenders of 72 layers."""
    return contenders(task, write, "72 layers")


def xl(task: Task, write: Write) -> dict[str, Any]:
    """The contenders of gpt2-xl."""
    return contenders(task, write, "gpt2-xl")


def contenders(task: Task, write: Write, model: str, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Times contenders of a model one after another, as long as there is time."""
    shape, end = TINY if task.is_quick else MODELS[model], time.monotonic() + task.seconds
    products = (128,) if task.is_quick else PRODUCTS
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights: Path | None = Path(folder) / "weights.safetensors"
        try:
            save_file(draw_weights(shape), weights)
        except (OSError, RuntimeError, SafetensorError) as error:
            print(f"each contender draws its weights by itself: {error}", flush=True)
            weights = None  # /tmp may be full: gpt2-xl takes several GB
        for name in names:
            left = end - time.monotonic() - 1.0
            found[name] = {"failed": "the time of this step is over"}
            if left >= FEWEST_SECONDS:
                found[name] = time_alone(shape, name, task.device, weights, products, left)
            evaluated = evaluate(shape, found)
            lines = text_of(table_of(evaluated)).splitlines()
            write(result := {"holds": None, "lines": lines, "report": evaluated})
    return result


def time_alone(
    shape: Shape, name: str, device: str, weights: Path | None, products: Sequence[int], timeout_s: float
) -> dict[str, Any]:
    """Returns what a contender reported from its process; `failed` with the reason, and `output`, if it failed."""
    try:
        found: dict[str, Any] = alone(name, device, timeout_s, time_contender, shape, name, weights, products)
    except RanksFailed as error:
        print(error, file=sys.stderr)
        summary, _, output = str(error).partition("\n")
        reason = error_line(output) if summary.endswith("raised an error") else summary
        return {"failed": reason, "output": str(error)}
    return found


def gpu_config(shape: Shape, name: str, precision: str = PRECISION, **sections: Mapping[str, Any]) -> Config:
    """Returns the configuration of a contender; ours is under ZeRO 1, as on several GPUs."""
    deepspeed = {"deepspeed": json.loads(ZERO1.read_text())} if kind_of(name) in OURS else {}
    return config_for(shape, name, precision, **deepspeed, **sections)


def time_contender(
    commands: Iterator[Any], device: str, shape: Shape, name: str, weights: Path | None, products: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A process that times one contender from a file of weights (None: drawn), and square products of some sizes.

    Yields seconds per step by round, first loss, peak bytes, and the best FLOP/s of products, as JSON values; `failed`
    and the rate alone if the device's memory is too small.
    """
    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))  # models are built on the host
    with one_process_mesh(device) as topology:
        rate = max(product_rate(size, topology.device) for size in products)
        sections = {"deepspeed": gpu_config(shape, name).deepspeed} if kind_of(name) in OURS else {}
        state = draw_weights(shape) if weights is None else load_file(weights)
        make = partial(build, name, shape, topology, PRECISION, state, **sections)
        try:
            started = start(make, topology.device, shape.batch(0), shape.batch(1))
            started.step(shape.batch(2))
            seconds = []
            for turn in range(ROUNDS):
                batches = [shape.batch(3 + turn * STEPS_PER_ROUND + index) for index in range(STEPS_PER_ROUND)]
                begin = now(topology.device)
                for batch in batches:
                    started.step(batch)
                seconds.append((now(topology.device) - begin) / STEPS_PER_ROUND)
        except torch.OutOfMemoryError as error:
            yield {"failed": f"out of memory ({str(error).splitlines()[0]})", "product_flops": rate}
            return
    measured = {"seconds_per_step": seconds, "first_loss": started.loss, "peak_bytes": started.peak_bytes}
    yield {**measured, "product_flops": rate}


def product_rate(size: int, device: torch.device, repeats: int = 20) -> float:
    """Returns FLOP/s of bf16 products of square matrices, the best of three rows of products."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(repeats):
            left @ right

    products()
    return repeats * 2 * size**3 / min(seconds_of(products, device) for _ in range(3))


def state_of(item: Mapping[str, Any]) -> str:
    """Returns why a contender has no ratios, as text; empty if it has."""
    return next((f"{key}: {item[key]}" for key in ("failed", "differs") if key in item), "")


def predicted_bytes(shape: Shape, name: str) -> float:
    """Returns the planner's memory of ours; of others weights, gradients and moments in fp32, without activations."""
    config = gpu_config(shape, name)
    if kind_of(name) in OURS:
        return rank_memory(config, batch_plan(config, 1), 0).device
    return 16.0 * config.model.num_parameters()


def evaluate(shape: Shape, reported: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns MFU, and ratios of tokens/s by medians, of what contenders reported (`time_contender`).

    Contenders whose first loss is not what it must be have `differs`, and no ratio.
    """
    found = {name: dict(item) for name, item in reported.items()}
    for name, reason in differences({name: item["first_loss"] for name, item in found.items() if "failed" not in item}):
        found[name]["differs"] = reason
    peak = max((item["product_flops"] for item in found.values() if "product_flops" in item), default=math.nan)
    times = {name: item["seconds_per_step"] for name, item in found.items() if not state_of(item)}
    flops = {name: gpu_config(shape, name).model.flops_per_token(shape.sequence_length) for name in times}
    references = [name for name in (PLAIN, PLAIN + COMPILED, TRANSFORMERS, TRANSFORMERS + COMPILED) if name in times]
    return {
        "shape": asdict(shape),
        "product_flops": None if math.isnan(peak) else peak,
        "contenders": found,
        "mfu": {name: flops[name] * shape.tokens_per_step / peak / median_of(times[name]) for name in times},
        "ratios": {
            f"{name} / {other}": median_of(times[other]) / median_of(times[name])
            for name in times
            for other in references
            if other != name
        },
        "predicted_bytes": {name: predicted_bytes(shape, name) for name in found},
    }


def differences(first_loss: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns the dense contenders whose first loss differs from plain PyTorch's (else the first dense one's)."""
    dense = {name: loss for name, loss in first_loss.items() if kind_of(name) != MLRA[2]}
    if not dense:
        return []
    reference = PLAIN if PLAIN in dense else next(iter(dense))
    return [
        (name, f"loss {loss!r} at the first step, {reference} has {dense[reference]!r}")
        for name, loss in dense.items()
        if not abs(loss / dense[reference] - 1.0) <= TOLERANCE[PRECISION]
    ]


def table_of(result: dict[str, Any]) -> Table:
    """Returns a model's result as a table."""
    shape, rows = Shape(**result["shape"]), list[list[Any]]()
    states = {name: state for name, item in result["contenders"].items() if (state := state_of(item))}
    for name, item in result["contenders"].items():
        if name in states:
            continue
        ratios = [result["ratios"].get(f"{name} / {other}") for other in (PLAIN, TRANSFORMERS)]
        seconds = [1e3 * value for value in item["seconds_per_step"]]
        memory = [item["peak_bytes"] / 2**30, result["predicted_bytes"][name] / 2**30]
        extremes = f"{min(seconds):.1f} {max(seconds):.1f}"
        rows.append([name, median_of(seconds), extremes, 100 * result["mfu"][name], *memory, *ratios])
    products = f"{(result['product_flops'] or math.nan) / 1e12:.2f} TFLOP/s"
    title = (
        f"{shape.name}: {shape.num_layers} layers, D={shape.hidden_size}, {shape.batch_size} x {shape.sequence_length} "
        f"tokens per step, vocabulary {shape.vocab_size}, {PRECISION}; matrix products {products}; {ROUNDS} rounds of "
        f"{STEPS_PER_ROUND} steps; tokens/s as ratios of medians"
    )
    headers = ["", "ms/step", "extremes", "MFU %", "GiB", "predicted", f"/ {PLAIN}", f"/ {TRANSFORMERS}"]
    return Table(title, headers, rows, "\n".join(f"{name}: {state}" for name, state in states.items()))


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
