"""One contender, or the gradients for parity, in a process of its own: what benchmarks.gpu starts.

    python -m benchmarks.gpu_child --device cpu|cuda time|gradients|weights SPECIFICATION FILE

Each contender has the device's memory for itself, and one that does not fit ends alone. SPECIFICATION is JSON; FILE is
written: JSON of times, or safetensors of losses and gradients, or of initial weights.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.commands import CommandFailed, run_command
from benchmarks.contenders import (
    COMPILED_BLOCKS,
    LEARNING_RATE,
    Shape,
    Step,
    build_plain,
    build_transformers,
    config_of,
    draw_weights,
    given_weights,
    one_process_mesh,
    step_of_engine,
    step_of_module,
)
from benchmarks.memory import start
from mlra_scale.config import Config, batch_plan
from mlra_scale.model.head_chunks import num_chunks
from mlra_scale.parallel import Topology, build_engine

PLAIN, TRANSFORMERS, DENSE, MLRA = "plain PyTorch", "transformers", "mlra_scale dense", "mlra_scale R=D/2"
COMPILED, AGAIN = ", compiled", " again"
ZERO1 = Path(__file__).resolve().parents[1] / "ds_configs" / "zero1.json"
MOST_CPU_THREADS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_child", description="Started by benchmarks.gpu.")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("what", choices=("time", "gradients", "weights"))
    parser.add_argument("specification", type=json.loads)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    if arguments.device == "cpu":
        # What is timed has one thread, as ranks have; of the rest nothing is timed.
        is_timed = arguments.what == "time"
        torch.set_num_threads(1 if is_timed else min(MOST_CPU_THREADS, len(os.sched_getaffinity(0))))
    specification = arguments.specification
    shape = Shape(**specification.pop("shape"))
    if arguments.what == "weights":
        save_file(draw_weights(shape), arguments.file)
        return 0
    with one_process_mesh(arguments.device) as topology:
        if arguments.what == "time":
            found = time_contender(shape, topology, **specification)
            arguments.file.write_text(json.dumps(found) + "\n")
        else:
            save_file(gradients(shape, topology, **specification), arguments.file)
    return 0


def run_child(device: str, what: str, specification: Mapping[str, Any], file: Path, timeout_s: float) -> None:
    """Runs this module in a process of its own.

    Args:
        device: "cpu" or "cuda".
        what: What it does.
        specification: Its arguments, a Shape among them.
        file: What it writes.
        timeout_s: Seconds that it may take.

    Raises:
        CommandFailed: It failed, took too long, or did not write its file.
    """
    text = json.dumps({**specification, "shape": dataclasses.asdict(specification["shape"])})
    command = [sys.executable, "-m", "benchmarks.gpu_child", "--device", device, what, text, str(file)]
    environment = {**os.environ, "DS_ACCELERATOR": device}  # not what the caller, on a GPU, chose for itself
    name = f"{what} of {specification.get('name', specification['shape'].name)}"
    run_command(name, command, environment, timeout_s)
    if not file.exists():
        raise CommandFailed(f"{name}: it wrote no result")


def config_for(shape: Shape, name: str, precision: str = "bf16", **sections: Mapping[str, Any]) -> Config:
    """The configuration of a contender's model; of ours the real one, of others one of as many FLOPs.

    Ours is under ZeRO 1, as on several GPUs.

    Args:
        shape: What is trained.
        name: Of the contender.
        precision: "fp32" or "bf16".
        **sections: As for `config_of`.
    """
    more = dict(COMPILED_BLOCKS) if name in (DENSE + COMPILED, MLRA + COMPILED) else {}
    if name.startswith((DENSE, MLRA)):
        more["deepspeed"] = json.loads(ZERO1.read_text())
    return config_of(shape, "mlra" if name.startswith(MLRA) else "dense", precision, **more, **sections)


def time_contender(
    shape: Shape,
    topology: Topology,
    name: str,
    precision: str,
    rounds: int,
    steps: int,
    products: list[int],
    weights: str | None = None,
) -> dict[str, Any]:
    """Seconds per step of one contender by round, its memory, and the device's rate of matrix products.

    Args:
        shape: What is trained.
        topology: The mesh of this process.
        name: Of the contender.
        precision: "fp32" or "bf16".
        rounds: How often `steps` are timed.
        steps: Steps per round.
        products: Sizes of the square matrices whose product is timed; the best rate counts.
        weights: A file of initial weights; None: they are drawn.

    Returns:
        JSON values; `failed` alone if the device's memory is too small.
    """
    device = topology.device
    rates = [product_rate(size, precision, device) for size in products]
    try:
        started = start(partial(build, name, shape, topology, precision, weights), device, *map(shape.batch, (0, 1)))
        started.step(shape.batch(2))
        seconds = []
        for turn in range(rounds):
            batches = [shape.batch(3 + turn * steps + index) for index in range(steps)]
            seconds.append(seconds_of(lambda given: [started.step(batch) for batch in given], device, batches) / steps)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory ({str(error).splitlines()[0]})", "product_flops": max(rates)}
    return {
        "seconds_per_step": seconds,
        "first_loss": started.loss,
        "peak_bytes": started.peak_bytes,
        "product_flops": max(rates),
    }


def build(name: str, shape: Shape, topology: Topology, precision: str, weights: str | None = None) -> Step:
    """Builds a contender by its name, with initial weights from a file or drawn."""
    kind = name.removesuffix(COMPILED).removesuffix(AGAIN)
    stored = None if weights is None else load_file(weights)
    if kind in (DENSE, MLRA):
        config = config_for(shape, name, precision)
        with contextlib.nullcontext() if stored is None else given_weights(stored):
            return step_of_engine(build_engine(config, batch_plan(config, 1), topology))
    module = (build_plain if kind == PLAIN else build_transformers)(shape, stored or draw_weights(shape, ("dense",)))
    return step_of_module(module, topology.device, precision, name.endswith(COMPILED))


def seconds_of(action: Callable[..., Any], device: torch.device, *arguments: Any) -> float:
    """Seconds until the device has finished an action on these arguments."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    action(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def product_rate(size: int, precision: str, device: torch.device, repeats: int = 20) -> float:
    """FLOP/s of products of square matrices, the best of three rows of products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(repeats):
            left @ right

    products()
    return repeats * 2 * size**3 / min(seconds_of(products, device) for _ in range(3))


def gradients(
    shape: Shape, topology: Topology, attentions: Sequence[str], is_masked: bool, has_chunks: bool
) -> dict[str, torch.Tensor]:
    """Losses and gradients of our models in fp32 and bf16, of one batch.

    Args:
        shape: A small model.
        topology: The mesh of this process.
        attentions: "dense", "mlra" or both.
        is_masked: Whether samples are of several documents that do not see each other.
        has_chunks: Whether the head must take the tokens in several chunks.

    Returns:
        fp32 on the CPU, by "attention/precision/parameter"; the loss is called "loss".
    """
    batch, data = shape.batch(0), {}
    if is_masked:
        # Borders in other places for each sample.
        shifted = batch.positions_BS + 7 * batch.sample_ids_B[:, None]
        batch = dataclasses.replace(batch, documents_BS=shifted // (shape.sequence_length // 3))
        data = {"document_attention": "masked"}
    found: dict[str, torch.Tensor] = {}
    for attention in attentions:
        for precision in ("fp32", "bf16"):
            config = config_for(shape, MLRA if attention == "mlra" else DENSE, precision, data=data)
            columns = config.model.padded_vocab_size
            assert not has_chunks or num_chunks(shape.tokens_per_step, columns, topology.device.type, False) > 1
            engine = build_engine(config, batch_plan(config, 1), topology)
            prefix = f"{attention}/{precision}"

            def keep(proposal: Any, engine: Any = engine, prefix: str = prefix) -> bool:
                for fragment in engine.owned_gradients():
                    info = engine.table[fragment.name]
                    name = f"{prefix}/{fragment.name}"
                    whole = found.setdefault(name, torch.zeros(info.shape)).view(-1)
                    whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values.float().cpu()
                return False

            loss = engine.train_batch([batch], LEARNING_RATE, keep).loss
            found[f"{prefix}/loss"] = torch.tensor([loss], dtype=torch.float64)
    return found


if __name__ == "__main__":
    sys.exit(main())
