"""What benchmarks/planner.py takes from the machine before it predicts: rates, links and overheads of a `cpu` cluster.

Both processes compute at the same time, as they do in a step. Nothing here runs one of the layouts that are predicted:
rates are those of single operations at the sizes at hand, links those of gloo between the two processes, and overheads
those of engines around a model so small that there is nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks.planner_ranks import LEARNING_RATE, RANKS, Pair, micro_batches
from mlra_scale.config import Config, batch_plan
from mlra_scale.parallel import Topology
from mlra_scale.planning.cluster import Cluster, named_cluster
from mlra_scale.planning.search import changed
from mlra_scale.planning.step_time import UPDATE_BYTES

REPEATS = 7
DEPTHS = (2, 8)
ACCUMULATIONS = (1, 5)


def calibrate(config: Config, timeout_s: float) -> Cluster:
    """Measures a `cpu` cluster of two devices.

    Args:
        config: The shape at hand.
        timeout_s: Seconds that a part of it may take.
    """
    found: dict[str, Any] = {}
    for serve in (serve_engines, serve_pipelines):
        pair = Pair(serve.__name__, serve, config, timeout_s=timeout_s)
        answers = pair.ask("measure")
        pair.close()
        found |= answers[0]
    found["pipeline_overhead"] = max(0.0, found.pop("per_pipelined_block") - found["block_overhead"])
    found["pipeline_overhead"] = max(0.0, found["pipeline_overhead"] - found["micro_batch_overhead"])
    return replace(named_cluster("cpu"), name="cpu, calibrated", source="measured before this run", **found)


def median_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median time of something that both ranks begin together, after one run that does not count."""
    times = []
    for turn in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        work()
        if turn:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def rates_of(config: Config) -> dict[str, float]:
    """Rates of matrix products and of everything else in a block, and of gloo."""
    model = config.model
    tokens = config.train.micro_batch_size * config.train.sequence_length
    D, F, V = model.hidden_size, model.ffn_size, model.padded_vocab_size
    flops = seconds = 0.0
    for outputs, inputs in ((D, D), (F, D), (D, F), (V, D)):
        x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
        gradient = torch.randn(tokens, outputs)
        for work in (
            lambda x=x, weight=weight: x @ weight.t(),
            lambda gradient=gradient, weight=weight: gradient @ weight,
            lambda gradient=gradient, x=x: gradient.t() @ x,
        ):
            flops += 2.0 * tokens * inputs * outputs
            seconds += median_seconds(work)
    rate = flops / seconds
    bandwidth = _elementwise_bytes(tokens, D, F) / median_seconds(_elementwise(tokens, D, F))
    small, large = 1_000, max(1_000_000, tokens * D)
    latency = median_seconds(lambda: dist.all_reduce(torch.zeros(small)))
    long = median_seconds(lambda: dist.all_reduce(torch.zeros(large)))
    slope = max(long - latency, 0.1 * long) / (4.0 * (large - small))
    return {
        "peak_flops": rate,
        "utilization": 1.0,
        "memory_bandwidth": bandwidth,
        "update_bandwidth": _update_bandwidth(12 * D * D),
        "link_intra": 1.0 / slope,
        "latency_intra": latency,
    }


def _elementwise(tokens: int, hidden_size: int, ffn_size: int) -> Callable[[], Any]:
    """What is no matrix product in a block, forward and backward."""
    norms = [nn.LayerNorm(hidden_size) for _ in range(2)]
    bias = nn.Parameter(torch.zeros(ffn_size))
    x = torch.randn(tokens, hidden_size, requires_grad=True)
    wide = torch.randn(tokens, ffn_size, requires_grad=True)

    def work() -> None:
        hidden = x + norms[0](x)
        hidden = hidden + norms[1](hidden)
        expanded = functional.gelu(wide + bias, approximate="tanh")
        torch.autograd.backward([hidden, expanded], [x.detach(), wide.detach()])

    return work


def _elementwise_bytes(tokens: int, hidden_size: int, ffn_size: int) -> float:
    """What planning/step_time.py takes for it."""
    return 3.0 * 4 * tokens * (14 * hidden_size + 2 * ffn_size)


def _update_bandwidth(num_weights: int) -> float:
    """Bytes per second, as planning/step_time.py counts them, of a gradient norm, clipping and AdamW."""
    weight = nn.Parameter(torch.randn(num_weights))
    weight.grad = torch.randn(num_weights)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def work() -> None:
        nn.utils.clip_grad_norm_([weight], 1.0, foreach=True)
        optimizer.step()

    return (UPDATE_BYTES + 4) * num_weights / median_seconds(work)


def tiny(config: Config, num_layers: int, accumulation: int, **parallel: int) -> Config:
    """A model that takes no time, in the same configuration otherwise."""
    model = {"vocab_size": 64, "vocab_padding_multiple": 2, "max_positions": 8, "num_layers": num_layers}
    model |= {"hidden_size": 16, "num_heads": 2}
    data = RANKS // (parallel.get("pipeline", 1))
    train = {"global_batch_size": accumulation * data, "micro_batch_size": 1, "sequence_length": 8}
    layout = {"tensor": 1, "pipeline": 1, "activation_checkpointing": "none", **parallel}
    return changed(config, {"model": model, "train": train, "parallel": layout})


def _mesh(config: Config) -> Topology:
    from mlra_scale.parallel import build_topology, initialize_distributed

    device = initialize_distributed("cpu", config.parallel.timeout_minutes)
    return build_topology(batch_plan(config, RANKS), device, config.parallel.timeout_minutes)


def _seconds_of(topology: Topology, configs: Sequence[Config]) -> list[float]:
    """Seconds of a step of engines of one mesh."""
    from mlra_scale.parallel import build_engine

    times = []
    for config in configs:
        plan = batch_plan(config, RANKS)
        engine = build_engine(config, plan, topology)
        batches = micro_batches(config, plan, 0)
        times.append(median_seconds(lambda: engine.train_batch(batches, LEARNING_RATE)))  # noqa: B023
    return times


def serve_engines(commands: Iterator[Any], config: Config) -> Iterator[Any]:
    """Rates, and overheads of the ZeRO engine: per block, by stage; per micro-batch; per step."""
    yield "ready"
    next(commands)
    rates = rates_of(config)
    base = changed(config, {"deepspeed": {}})
    topology = _mesh(tiny(base, DEPTHS[0], ACCUMULATIONS[0]))
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
    latency = rates["latency_intra"]
    by_stage = [0.0]
    for stage in (1, 2, 3):
        zero = changed(config, {"deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}}})
        pair = _seconds_of(topology, [tiny(zero, depth, ACCUMULATIONS[0]) for depth in DEPTHS])
        gathers = latency if stage == 3 else 0.0
        by_stage.append(max(0.0, (pair[1] - pair[0]) / (DEPTHS[1] - DEPTHS[0]) - block - gathers))
    yield rates | {
        "block_overhead": block,
        "micro_batch_overhead": max(0.0, micro_batch),
        "step_overhead": max(0.0, shallow - DEPTHS[0] * block - max(0.0, micro_batch) - latency),
        "zero_overhead": tuple(by_stage),
    }


def serve_pipelines(commands: Iterator[Any], config: Config) -> Iterator[Any]:
    """Time of a micro-batch of two stages of one block each."""
    yield "ready"
    next(commands)
    base = changed(config, {"deepspeed": {}})
    configs = [tiny(base, 2, accumulation, pipeline=2) for accumulation in ACCUMULATIONS]
    few, many = _seconds_of(_mesh(configs[0]), configs)
    yield {"per_pipelined_block": (many - few) / (ACCUMULATIONS[1] - ACCUMULATIONS[0])}
