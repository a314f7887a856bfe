"""One contender, or the gradients for parity, in a process of its own: what benchmarks.gpu starts.

    python -m benchmarks.gpu_child --device cpu|cuda time|gradients SPECIFICATION FILE

Each contender has the device's memory for itself, and one that does not fit ends alone. SPECIFICATION is JSON; FILE is
written: JSON of times, or safetensors of losses and gradients.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.contenders import (
    COMPILED_BLOCKS,
    LEARNING_RATE,
    Shape,
    Step,
    build_ours,
    build_plain,
    build_transformers,
    config_of,
    one_process_mesh,
    step_of_engine,
    step_of_module,
)
from benchmarks.memory import start
from mlra_scale.model.initialization import initial_state
from mlra_scale.parallel import Topology

PLAIN, TRANSFORMERS, DENSE, MLRA = "plain PyTorch", "transformers", "mlra_scale dense", "mlra_scale R=D/2"
COMPILED, AGAIN = ", compiled", " again"


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_child", description="Started by benchmarks.gpu.")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("what", choices=("time", "gradients"))
    parser.add_argument("specification", type=json.loads)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    specification = arguments.specification
    shape = Shape(**specification.pop("shape"))
    with one_process_mesh(arguments.device) as topology:
        if arguments.what == "time":
            found = time_contender(shape, topology, **specification)
            arguments.file.write_text(json.dumps(found) + "\n")
        else:
            save_file(gradients(shape, topology), arguments.file)
    return 0


def time_contender(
    shape: Shape, topology: Topology, name: str, precision: str, rounds: int, steps: int, products: list[int]
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

    Returns:
        JSON values; `failed` alone if the device's memory is too small.
    """
    device = topology.device
    rates = [product_rate(size, precision, device) for size in products]
    try:
        started = start(lambda: build(name, shape, topology, precision), device, shape.batch(0), shape.batch(1))
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


def build(name: str, shape: Shape, topology: Topology, precision: str) -> Step:
    """Builds a contender by its name."""
    is_compiled = name.endswith(COMPILED)
    kind = name.removesuffix(COMPILED).removesuffix(AGAIN)
    if kind in (DENSE, MLRA):
        sections = COMPILED_BLOCKS if is_compiled else {}
        return step_of_engine(build_ours(shape, "mlra" if kind == MLRA else "dense", precision, topology, **sections))
    config = config_of(shape, "dense", precision)
    weights = initial_state(config.model, config.train.seed)
    module = (build_plain if kind == PLAIN else build_transformers)(shape, weights)
    return step_of_module(module, topology.device, precision, is_compiled)


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


def gradients(shape: Shape, topology: Topology) -> dict[str, torch.Tensor]:
    """Losses and gradients of our models, dense and MLRA, in fp32 and bf16, of one batch.

    Returns:
        fp32 on the CPU, by "attention/precision/parameter"; the loss is called "loss".
    """
    found: dict[str, torch.Tensor] = {}
    for attention in ("dense", "mlra"):
        for precision in ("fp32", "bf16"):
            engine = build_ours(shape, attention, precision, topology)
            prefix = f"{attention}/{precision}"

            def keep(proposal: Any, engine: Any = engine, prefix: str = prefix) -> bool:
                for fragment in engine.owned_gradients():
                    info = engine.table[fragment.name]
                    name = f"{prefix}/{fragment.name}"
                    whole = found.setdefault(name, torch.zeros(info.shape)).view(-1)
                    whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values.float().cpu()
                return False

            loss = engine.train_batch([shape.batch(0)], LEARNING_RATE, keep).loss
            found[f"{prefix}/loss"] = torch.tensor([loss], dtype=torch.float64)
    return found


if __name__ == "__main__":
    sys.exit(main())
