"""The planner's constants, measured on all ranks of a cluster: the steps `links` and `rates` of benchmarks/check.py.

All ranks compute at the same time, as in a training step. Nothing here runs one of the layouts that are predicted:
rates are those of single operations at the preset's sizes, links those of all-reduces, and overheads those of engines
around a model so small that there is nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, log2
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks.check import Task, Write
from benchmarks.contenders import LEARNING_RATE, MINUTES, mesh, random_batch
from benchmarks.harness import seconds_of
from mlra_scale.config import BatchPlan, Config, batch_plan, load_named_config
from mlra_scale.data import Batch
from mlra_scale.model.low_rank_plan import BYTES
from mlra_scale.parallel import Topology, build_engine, initialize_distributed
from mlra_scale.planning.cluster import cluster_of_device, named_cluster
from mlra_scale.planning.search import changed
from mlra_scale.planning.step_time import UPDATE_BYTES

REPEATS = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEPTHS = (2, 8)
ACCUMULATIONS = (1, 5)


def device_of(task: Task) -> torch.device:
    """Starts the process group, and returns this rank's device."""
    torch.set_num_threads(1)
    return initialize_distributed(task.device, MINUTES)


def random_batches(config: Config, plan: BatchPlan, step: int) -> list[Batch]:
    """Returns one rank's micro-batches of random tokens."""
    sizes = (plan.micro_batch_size, plan.sequence_length, config.model.vocab_size)
    return [random_batch(step * plan.accumulation_steps + index, *sizes) for index in range(plan.accumulation_steps)]


def base_of(task: Task, device: torch.device) -> dict[str, Any]:
    """Returns the named cluster with such devices, with the nodes and the memory that are really there."""
    sizes = {"nodes": task.world_size // task.devices_per_node, "devices_per_node": task.devices_per_node}
    if device.type == "cpu":
        return {"name": "cpu", **sizes, "source": "measured by benchmarks.check; the rest as for the cluster 'cpu'"}
    device_name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    name = cluster_of_device(device_name) or "h100"
    source = f"measured by benchmarks.check on {device_name}; the rest as for the cluster '{name}'"
    return {"name": name, **sizes, "memory": float(memory), "source": source}


def links(task: Task, write: Write) -> dict[str, Any]:
    """Bandwidth and latency of all-reduces within nodes, and between nodes from all ranks at once."""
    device, ranks, per_node = device_of(task), task.world_size, task.devices_per_node
    num_bytes = 4 << 20 if device.type == "cpu" else 256 << 20
    levels = {
        "intra": [list(range(first, first + per_node)) for first in range(0, ranks, per_node)],
        "inter": [list(range(local, ranks, per_node)) for local in range(per_node)],
    }
    constants: dict[str, float] = {}
    lines = []
    for name, groups in levels.items():
        if len(groups[0]) == 1:
            continue
        group, _ = dist.new_subgroups_by_enumeration(groups)
        found = torch.tensor(link_of(group, device, num_bytes), dtype=torch.float64, device=device)
        # The slowest group decides what a step takes.
        slowest = found * torch.tensor([1.0, -1.0], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MIN)
        bandwidth, latency = float(slowest[0]), -float(slowest[1])
        constants |= {f"link_{name}": bandwidth, f"latency_{name}": latency}
        where = "within a node" if name == "intra" else "between nodes"
        lines.append(
            f"{dist.get_backend()} {where}, {len(groups)} group(s) of {len(groups[0])} at once, the slowest: "
            f"{8 * bandwidth / 1e9:.4g} Gbit/s sent by each rank, {1e6 * latency:.1f} us latency"
        )
    return {"holds": None, "constants": constants, "base": base_of(task, device), "lines": lines}


def rates(task: Task, write: Write) -> dict[str, Any]:
    """Rates of matrix products and everything else at the preset's sizes, and engines' overheads; of the worst rank."""
    device, config = device_of(task), preset_of(task)
    found = rates_of(config, device)
    peak = max(found.pop("peak_flops"), 1.0)
    base = base_of(task, device)
    named = named_cluster(base["name"])
    if device.type == "cpu":
        rate = {"peak_flops": peak, "utilization": 1.0}
    else:
        rate = {"peak_flops": max(named.peak_flops, peak), "utilization": min(1.0, peak / named.peak_flops)}
    latency = task.result_of("links").get("constants", {}).get("latency_intra", named.latency_intra)
    constants: dict[str, Any] = {**found, **rate}
    write({"holds": None, "base": base, "constants": constants, "lines": _constant_lines(constants)})
    constants |= host_costs(device) if device.type == "cuda" else {}
    constants |= overheads_of(changed(config, {"deepspeed": {}}), device, latency if task.world_size > 1 else 0.0)
    gathered: list[Any] = [None] * task.world_size
    dist.all_gather_object(gathered, constants)
    for name in constants:
        values = [each[name] for each in gathered]
        is_time = name.endswith("overhead") or name in ("launch", "wait")
        constants[name] = max(values) if is_time else min(values)
    return {"holds": None, "base": base, "constants": constants, "lines": _constant_lines(constants)}


def _constant_lines(constants: dict[str, Any]) -> list[str]:
    units = {"peak_flops": (1e12, "TFLOP/s"), "memory_bandwidth": (1e9, "GB/s"), "update_bandwidth": (1e9, "GB/s")}
    lines = []
    for name, value in constants.items():
        factor, unit = units.get(name, (1.0, "") if name == "utilization" else (1e-6, "us"))
        values = value if isinstance(value, tuple) else (value,)
        lines.append(f"{name} {' '.join(f'{each / factor:.4g}' for each in values)} {unit}".rstrip())
    return lines


def preset_of(task: Task) -> Config:
    """Returns the configuration whose plan is compared."""
    return load_named_config(task.preset, None, None, [*task.overrides, f"train.device={task.device}"])[0]


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Returns the median time of an action that all ranks begin together, after one run that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        times.append(seconds_of(work, device))
    return statistics.median(times[1:])


def link_of(group: dist.ProcessGroup | None, device: torch.device, num_bytes: int) -> tuple[float, float]:
    """Measures all-reduces of a group (None: of all ranks) as Traffic.seconds (planning/communication.py) counts them.

    Every rank of the job measures a group at the same time. The small all-reduce has 4,000 bytes.

    Returns:
        Bytes per second that a rank sends, and seconds of a message over the base-2 logarithm of the ranks.
    """
    ranks, small = dist.get_world_size(group), 4_000
    buffers = [torch.zeros(size // 4, device=device) for size in (small, num_bytes)]
    short, long = (median_seconds(partial(dist.all_reduce, each, group=group), device) for each in buffers)
    # The rest of the long one, but never so little that noise would make an endless bandwidth of it.
    seconds = max(long - short, 0.1 * long)
    return 2.0 * (ranks - 1) / ranks * (num_bytes - small) / seconds, short / ceil(log2(ranks))


def rates_of(config: Config, device: torch.device) -> dict[str, float]:
    """Measures matrix products and everything else in a block, in the precision of the configuration.

    Returns:
        FLOP/s (the sustained rate as `peak_flops`) and bytes/s, by name of a constant of Cluster.
    """
    model, precision = config.model, config.train.precision
    tokens = config.train.micro_batch_size * config.train.sequence_length
    D, F, V = model.hidden_size, model.ffn_size, model.padded_vocab_size
    kind: dict[str, Any] = {"device": device, "dtype": DTYPES[precision]}
    flops = seconds = 0.0
    for outputs, inputs in ((D, D), (F, D), (D, F), (V, D)):
        x, weight = torch.randn(tokens, inputs, **kind), torch.randn(outputs, inputs, **kind)
        gradient = torch.randn(tokens, outputs, **kind)
        for left, right in ((x, weight.t()), (gradient, weight), (gradient.t(), x)):
            flops += 2.0 * tokens * inputs * outputs
            seconds += median_seconds(partial(torch.matmul, left, right), device)
    # What planning/step_time.py counts for everything that is no matrix product.
    elementwise_bytes = 3.0 * BYTES[precision] * tokens * (14 * D + 2 * F)
    return {
        "peak_flops": flops / seconds,
        "memory_bandwidth": elementwise_bytes / median_seconds(_elementwise(tokens, D, F, kind), device),
        "update_bandwidth": _update_bandwidth(12 * D * D, device),
    }


def _elementwise(tokens: int, hidden_size: int, ffn_size: int, kind: dict[str, Any]) -> Callable[[], Any]:
    """Returns the operations of a block that are no matrix products, forward and backward."""
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


def _update_bandwidth(num_weights: int, device: torch.device) -> float:
    """Returns bytes per second, as planning/step_time.py counts them, of a gradient norm, clipping and AdamW."""
    weight = nn.Parameter(torch.randn(num_weights, device=device))
    weight.grad = torch.randn(num_weights, device=device)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def work() -> None:
        nn.utils.clip_grad_norm_([weight], 1.0, foreach=True)
        optimizer.step()

    return (UPDATE_BYTES + 4) * num_weights / median_seconds(work, device)


def host_costs(device: torch.device) -> dict[str, float]:
    """Returns the host's seconds to start one operation of a GPU, and to wait for one that is done."""
    value, number = torch.zeros(1, device=device), 1_000

    def launch() -> None:
        for _ in range(number):
            value.add_(1.0)

    def wait() -> None:
        for _ in range(number):
            value.item()

    # An operation of one number takes the device less time than the host needs to start it.
    return {name: median_seconds(work, device) / number for name, work in (("launch", launch), ("wait", wait))}


def tiny(config: Config, num_layers: int, accumulation: int, pipeline: int = 1) -> Config:
    """Returns a model that takes no time, in the same configuration otherwise."""
    model = {"vocab_size": 64, "vocab_padding_multiple": 2, "max_positions": 8, "num_layers": num_layers}
    model |= {"hidden_size": 16, "num_heads": 2}
    batch = accumulation * dist.get_world_size() // pipeline
    train = {"global_batch_size": batch, "micro_batch_size": 1, "sequence_length": 8}
    layout = {"tensor": 1, "pipeline": pipeline, "activation_checkpointing": "none"}
    return changed(config, {"model": model, "train": train, "parallel": layout})


def _seconds_of(topology: Topology, configs: Sequence[Config]) -> list[float]:
    """Returns the seconds of a step of engines of one mesh."""
    times = []
    for config in configs:
        plan = batch_plan(config, topology.world_size)
        step = partial(build_engine(config, plan, topology).train_batch, random_batches(config, plan, 0), LEARNING_RATE)
        times.append(median_seconds(step, topology.device))
    return times


def overheads_of(base: Config, device: torch.device, latency: float) -> dict[str, Any]:
    """Measures the host time of the engines: per block, by ZeRO stage; per micro-batch, also in a pipeline; per step.

    Args:
        base: A configuration without settings of DeepSpeed.
        device: The device.
        latency: Seconds of a message among all ranks; 0 for one rank.

    Returns:
        Seconds, by name of a constant of Cluster; without `pipeline_overhead` for an odd number of ranks.
    """
    shallow_config = tiny(base, DEPTHS[0], ACCUMULATIONS[0])
    layers, micro_batches = DEPTHS[1] - DEPTHS[0], ACCUMULATIONS[1] - ACCUMULATIONS[0]
    with mesh(shallow_config, device) as topology:
        deep_config, often_config = tiny(base, DEPTHS[1], ACCUMULATIONS[0]), tiny(base, DEPTHS[0], ACCUMULATIONS[1])
        shallow, deep, often = _seconds_of(topology, [shallow_config, deep_config, often_config])
        block = max(0.0, deep - shallow) / layers
        micro_batch = max(0.0, (often - shallow) / micro_batches - DEPTHS[0] * block)
        # Latencies are counted by messages (planning/communication.py), and are no overhead here: at stage 0 one sum
        # a step, at stage 3 a gather per block.
        by_stage = [0.0]
        for stage in (1, 2, 3):
            zero = changed(base, {"deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}}})
            few, many = _seconds_of(topology, [tiny(zero, depth, ACCUMULATIONS[0]) for depth in DEPTHS])
            by_stage.append(max(0.0, (many - few) / layers - block - (latency if stage == 3 else 0.0)))
    found: dict[str, Any] = {
        "block_overhead": block,
        "micro_batch_overhead": micro_batch,
        "step_overhead": max(0.0, shallow - DEPTHS[0] * block - micro_batch - latency),
        "zero_overhead": tuple(by_stage),
    }
    if dist.get_world_size() % 2 == 0:
        # Two stages of one block each; a micro-batch of the pipeline is one block's work and the engine's.
        configs = [tiny(base, 2, accumulation, pipeline=2) for accumulation in ACCUMULATIONS]
        with mesh(configs[0], device) as topology:
            few, many = _seconds_of(topology, configs)
        found["pipeline_overhead"] = max(0.0, (many - few) / micro_batches - block - micro_batch)
    return found
