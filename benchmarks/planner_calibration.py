"""The planner's constants, measured: by benchmarks/planner.py before it predicts, by benchmarks/check.py on a cluster.

All ranks compute at the same time, as they do in a step. Nothing here runs one of the layouts that are predicted: rates
are those of single operations at the sizes at hand, links those of all-reduces, and overheads those of engines around a
model so small that there is nothing else.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, log2
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks.planner_ranks import LEARNING_RATE, micro_batches, pair
from mlra_scale.config import Config, batch_plan
from mlra_scale.model.low_rank_plan import BYTES
from mlra_scale.parallel import Topology, build_engine, build_topology, destroy_topology, initialize_distributed
from mlra_scale.planning.cluster import Cluster, named_cluster
from mlra_scale.planning.search import changed
from mlra_scale.planning.step_time import UPDATE_BYTES

REPEATS = 7
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEPTHS = (2, 8)
ACCUMULATIONS = (1, 5)


def calibrate(config: Config, timeout_s: float) -> Cluster:
    """Measures a `cpu` cluster of two devices.

    Args:
        config: The shape at hand.
        timeout_s: Seconds that a part of it may take.
    """
    with pair("calibration", serve_constants, config, timeout_s) as ranks:
        found = ranks.ask("measure")[0]
    return replace(named_cluster("cpu"), name="cpu, calibrated", source="measured before this run", **found)


def serve_constants(commands: Iterator[Any], config: Config) -> Iterator[Any]:
    """All constants of two processes."""
    logging.disable(logging.WARNING)
    yield "ready"
    next(commands)
    rates = rates_of(config, torch.device("cpu"))
    model = config.model
    largest = 4 * max(1_000_000, config.train.micro_batch_size * config.train.sequence_length * model.hidden_size)
    bandwidth, latency = link_of(None, torch.device("cpu"), largest)
    base = changed(config, {"deepspeed": {}})
    yield {
        **rates,
        "link_intra": bandwidth,
        "latency_intra": latency,
        **overheads_of(base, torch.device("cpu"), latency),
        "utilization": 1.0,
    }


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Median time of something that all ranks begin together, after one run that does not count."""
    times = []
    for turn in range(repeats + 1):
        dist.barrier()
        _wait_for(device)
        start = time.perf_counter()
        work()
        _wait_for(device)
        if turn:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates_of(config: Config, device: torch.device) -> dict[str, float]:
    """Rates of matrix products and of everything else in a block, in the precision of the configuration.

    Returns:
        FLOP/s (the sustained rate as `peak_flops`) and bytes/s, by name of a constant of Cluster.
    """
    model, precision = config.model, config.train.precision
    tokens = config.train.micro_batch_size * config.train.sequence_length
    D, F, V = model.hidden_size, model.ffn_size, model.padded_vocab_size
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, DTYPES[precision])}
    flops = seconds = 0.0
    for outputs, inputs in ((D, D), (F, D), (D, F), (V, D)):
        x, weight = torch.randn(tokens, inputs, **kind), torch.randn(outputs, inputs, **kind)
        gradient = torch.randn(tokens, outputs, **kind)
        for work in (
            lambda x=x, weight=weight: x @ weight.t(),
            lambda gradient=gradient, weight=weight: gradient @ weight,
            lambda gradient=gradient, x=x: gradient.t() @ x,
        ):
            flops += 2.0 * tokens * inputs * outputs
            seconds += median_seconds(work, device)
    elementwise = median_seconds(_elementwise(tokens, D, F, kind), device)
    return {
        "peak_flops": flops / seconds,
        "memory_bandwidth": _elementwise_bytes(tokens, D, F, BYTES[precision]) / elementwise,
        "update_bandwidth": _update_bandwidth(12 * D * D, device),
    }


def link_of(group: dist.ProcessGroup | None, device: torch.device, num_bytes: int) -> tuple[float, float]:
    """Bandwidth and latency of all-reduces of a group, as Traffic.seconds (planning/communication.py) counts them.

    Args:
        group: Of several ranks; None: all. Every rank of the job measures a group at the same time.
        device: Of this rank.
        num_bytes: Of the large all-reduce; the small one has 4,000.

    Returns:
        Bytes per second that a rank sends, and seconds of a message over the base-2 logarithm of the ranks.
    """
    ranks, small = dist.get_world_size(group), 4_000
    buffers = [torch.zeros(size // 4, device=device) for size in (small, num_bytes)]
    short, long = (median_seconds(partial(dist.all_reduce, each, group=group), device) for each in buffers)
    # What is left of the long one, but never so little that noise would make an endless bandwidth of it.
    seconds = max(long - short, 0.1 * long)
    return 2.0 * (ranks - 1) / ranks * (num_bytes - small) / seconds, short / ceil(log2(ranks))


def _elementwise(tokens: int, hidden_size: int, ffn_size: int, kind: dict[str, Any]) -> Callable[[], Any]:
    """What is no matrix product in a block, forward and backward."""
    norms = [nn.LayerNorm(hidden_size, **kind) for _ in range(2)]
    bias = nn.Parameter(torch.zeros(ffn_size, **kind))
    x = torch.randn(tokens, hidden_size, requires_grad=True, **kind)
    wide = torch.randn(tokens, ffn_size, requires_grad=True, **kind)

    def work() -> None:
        hidden = x + norms[0](x)
        hidden = hidden + norms[1](hidden)
        expanded = functional.gelu(wide + bias, approximate="tanh")
        torch.autograd.backward([hidden, expanded], [x.detach(), wide.detach()])

    return work


def _elementwise_bytes(tokens: int, hidden_size: int, ffn_size: int, element: int) -> float:
    """What planning/step_time.py takes for it."""
    return 3.0 * element * tokens * (14 * hidden_size + 2 * ffn_size)


def _update_bandwidth(num_weights: int, device: torch.device) -> float:
    """Bytes per second, as planning/step_time.py counts them, of a gradient norm, clipping and AdamW."""
    weight = nn.Parameter(torch.randn(num_weights, device=device))
    weight.grad = torch.randn(num_weights, device=device)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def work() -> None:
        nn.utils.clip_grad_norm_([weight], 1.0, foreach=True)
        optimizer.step()

    return (UPDATE_BYTES + 4) * num_weights / median_seconds(work, device)


def tiny(config: Config, num_layers: int, accumulation: int, **parallel: int) -> Config:
    """A model that takes no time, in the same configuration otherwise."""
    model = {"vocab_size": 64, "vocab_padding_multiple": 2, "max_positions": 8, "num_layers": num_layers}
    model |= {"hidden_size": 16, "num_heads": 2}
    data = dist.get_world_size() // (parallel.get("pipeline", 1))
    train = {"global_batch_size": accumulation * data, "micro_batch_size": 1, "sequence_length": 8}
    layout = {"tensor": 1, "pipeline": 1, "activation_checkpointing": "none", **parallel}
    return changed(config, {"model": model, "train": train, "parallel": layout})


def _topology(config: Config, device: torch.device) -> Topology:
    initialize_distributed(device.type, config.parallel.timeout_minutes)
    return build_topology(batch_plan(config, dist.get_world_size()), device, config.parallel.timeout_minutes)


def host_costs(device: torch.device) -> dict[str, float]:
    """Seconds in which the host starts one operation of a GPU, and in which it waits for one that is done."""
    value = torch.zeros(1, device=device)
    number = 1_000

    def launch() -> None:
        for _ in range(number):
            value.add_(1.0)

    def wait() -> None:
        for _ in range(number):
            value.item()

    # What the device takes for an operation of one number is less than what the host takes to start it.
    return {name: median_seconds(work, device) / number for name, work in (("launch", launch), ("wait", wait))}


def _seconds_of(topology: Topology, configs: Sequence[Config]) -> list[float]:
    """Seconds of a step of engines of one mesh."""
    times = []
    for config in configs:
        plan = batch_plan(config, topology.world_size)
        engine = build_engine(config, plan, topology)
        batches = micro_batches(config, plan, 0)
        times.append(median_seconds(lambda: engine.train_batch(batches, LEARNING_RATE), topology.device))  # noqa: B023
    return times


def overheads_of(base: Config, device: torch.device, latency: float) -> dict[str, Any]:
    """Overheads of the engines: per block, by ZeRO stage; per micro-batch, of a pipeline too; per step.

    Args:
        base: A configuration without settings of DeepSpeed.
        device: Of this rank.
        latency: Seconds of a message among all ranks; 0 for one rank.

    Returns:
        Seconds, by name of a constant of Cluster; without `pipeline_overhead` for an odd number of ranks.
    """
    topology = _topology(tiny(base, DEPTHS[0], ACCUMULATIONS[0]), device)
    shallow, deep, often = _seconds_of(
        topology,
        [
            tiny(base, DEPTHS[0], ACCUMULATIONS[0]),
            tiny(base, DEPTHS[1], ACCUMULATIONS[0]),
            tiny(base, DEPTHS[0], ACCUMULATIONS[1]),
        ],
    )
    block = max(0.0, deep - shallow) / (DEPTHS[1] - DEPTHS[0])
    micro_batch = (often - shallow) / (ACCUMULATIONS[1] - ACCUMULATIONS[0]) - DEPTHS[0] * block
    # Latencies are counted by messages (planning/communication.py), and so are no overhead here: at stage 0 one sum a
    # step, at stage 3 a gather per block.
    by_stage = [0.0]
    for stage in (1, 2, 3):
        zero = changed(base, {"deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}}})
        times = _seconds_of(topology, [tiny(zero, depth, ACCUMULATIONS[0]) for depth in DEPTHS])
        gathers = latency if stage == 3 else 0.0
        by_stage.append(max(0.0, (times[1] - times[0]) / (DEPTHS[1] - DEPTHS[0]) - block - gathers))
    found: dict[str, Any] = {
        "block_overhead": block,
        "micro_batch_overhead": max(0.0, micro_batch),
        "step_overhead": max(0.0, shallow - DEPTHS[0] * block - max(0.0, micro_batch) - latency),
        "zero_overhead": tuple(by_stage),
    }
    destroy_topology(topology)
    if topology.world_size % 2 == 0:
        # Two stages of one block each; a micro-batch of the pipeline's is one block's work and the engine's.
        configs = [tiny(base, 2, accumulation, pipeline=2) for accumulation in ACCUMULATIONS]
        topology = _topology(configs[0], device)
        few, many = _seconds_of(topology, configs)
        per_block = (many - few) / (ACCUMULATIONS[1] - ACCUMULATIONS[0])
        found["pipeline_overhead"] = max(0.0, max(0.0, per_block - block) - found["micro_batch_overhead"])
        destroy_topology(topology)
    return found
