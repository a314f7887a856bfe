"""What the planner found, as text and as plain values. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from mlra_scale.config import engine_kind, zero_stage
from mlra_scale.model.low_rank_plan import low_rank_plan
from mlra_scale.planning.cluster import GIB, Cluster
from mlra_scale.planning.search import Candidate, Found

COMPONENTS = ("weights", "gradients", "master", "moments", "activations", "logits", "temporary")


def found_text(found: Found, cluster: Cluster, chosen: Candidate, top: int) -> str:
    """Returns the tables of the fastest layouts and what was left out.

    Args:
        found: A search that found some.
        cluster: What it was for.
        chosen: The planner's choice among them, which is marked, and shown wherever it stands.
        top: How many layouts to show.
    """
    numbered = [(f"{number}{'*' * (each is chosen)}", each) for number, each in enumerate(found.feasible, start=1)]
    shown = [*numbered[:top], *(each for each in numbered[top:] if each[1] is chosen)]
    return "\n".join(
        [
            *cluster_lines(cluster),
            "",
            f"{len(found.feasible)} layouts fit; the {min(top, len(numbered))} fastest by the estimate (not measured), "
            "and the planner's choice (*):",
            *aligned([TIME_HEADER, *(time_row(number, each) for number, each in shown)]),
            "",
            f"memory of a rank of the largest stage, GiB ({cluster.usable_memory / GIB:.1f} usable):",
            *aligned([_MEMORY_HEADER, *(memory_row(number, each) for number, each in shown)]),
            "",
            *left_out_lines(found),
        ]
    )


TIME_HEADER = (
    *("#", "tensor", "pipeline", "data", "ZeRO", "micro", "accum", "recompute", "low-rank", "seq.par."),
    *("step s", "tokens/s", "MFU %", "bubble %", "sent GB: tensor", "pipeline", "data"),
)
_MEMORY_HEADER = ("#", *COMPONENTS, "sum", "stage", "host")


def cluster_lines(cluster: Cluster) -> list[str]:
    """Returns what was assumed of the cluster."""
    return [
        f"cluster {cluster.name}: {cluster.nodes} node(s) of {cluster.devices_per_node} device(s), "
        f"{cluster.memory / GIB:.1f} GiB each, peak {cluster.peak_flops / 1e12:.4g} TFLOP/s of which matrix products "
        f"reach {100 * cluster.utilization:.0f} %, links {8 * cluster.link_intra / 1e9:.4g} Gbit/s within a node and "
        f"{8 * cluster.link_inter / 1e9:.4g} between nodes",
        *wrap(f"({cluster.source})", 116, subsequent_indent=" "),
    ]


def time_row(number: int | str, candidate: Candidate) -> tuple[str, ...]:
    """Returns a layout's line in the table of times."""
    plan, time = candidate.plan, candidate.time
    factorised = any(candidate.config.model.is_factorised(name) for name in "qkv")
    return (
        *(str(number), str(plan.tensor), str(plan.pipeline), str(plan.data), str(zero_stage(candidate.config))),
        *(str(plan.micro_batch_size), str(plan.accumulation_steps)),
        candidate.config.parallel.activation_checkpointing,
        low_rank_plan(candidate.config, plan) if factorised and plan.tensor > 1 else "-",
        ("yes" if candidate.config.parallel.sequence_parallel else "no") if plan.tensor > 1 else "-",
        f"{time.seconds:.4g}",
        f"{plan.tokens_per_step / time.seconds:.4g}",
        f"{100 * time.mfu:.1f}",
        f"{100 * time.bubble:.1f}",
        *(f"{time.sent[kind] / 1e9:.3g}" for kind in ("tensor", "pipeline", "data")),
    )


def memory_row(number: int | str, candidate: Candidate) -> tuple[str, ...]:
    """Returns a layout's line in the table of memory."""
    memory = candidate.memory
    parts = [getattr(memory, name) / GIB for name in COMPONENTS]
    numbers = (f"{part:.2f}" for part in (*parts, memory.device / GIB))
    return (str(number), *numbers, str(candidate.stage), f"{(memory.host + memory.snapshot) / GIB:.2f}")


def left_out_lines(found: Found) -> list[str]:
    """Returns how many layouts were left out, and why."""
    if not found.left_out:
        return ["left out: none"]
    return ["left out:", *(f"  {count:>5}  {reason}" for reason, count in found.left_out.most_common())]


def nothing_fits(found: Found, cluster: Cluster) -> str:
    """Returns what is told where no layout fits: the smallest need, and what would help."""
    smallest = found.smallest
    plan, memory = smallest.plan, smallest.memory
    largest = max(COMPONENTS, key=lambda name: float(getattr(memory, name)))
    remedies = {
        "activations": "shorten train.sequence_length",
        "logits": "shorten train.sequence_length",
        "weights": "use more devices",
        "gradients": "use more devices, or a --config with smaller deepspeed buckets",
        "temporary": "use more devices",
    }
    remedy = remedies.get(largest, "use more devices, or offload the optimizer (ds_configs/zero3_offload.json)")
    return (
        f"no layout fits: the smallest needs {memory.device / GIB:.2f} GiB per device, and of "
        f"{cluster.memory / GIB:.2f} GiB {max(0.0, cluster.usable_memory) / GIB:.2f} are left for tensors (tensor "
        f"{plan.tensor}, pipeline {plan.pipeline}, "
        f"data {plan.data}, ZeRO {zero_stage(smallest.config)}, micro-batch {plan.micro_batch_size}, recompute "
        f"{smallest.config.parallel.activation_checkpointing}); most of it are {largest} "
        f"({getattr(memory, largest) / GIB:.2f} GiB): {remedy}"
    )


def commands(candidate: Candidate, cluster: Cluster, start: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns the command lines that train a layout.

    Args:
        candidate: The layout.
        cluster: What it runs on; several nodes are started by sbatch, or by torchrun on each.
        start: Flags that say where the configuration comes from.
        overrides: What else was given.
    """
    engine = ["--ds-config", candidate.engine.file] if candidate.engine.file is not None else []
    more = [*candidate.overrides(), *overrides]
    if cluster.name == "cpu":
        more.append("train.device=cpu")
    arguments = shlex.join([*start, *engine, "--run-dir", "runs/planned", *more])
    if cluster.world_size == 1:
        return [f"python -m mlra_scale.train {arguments}"]
    if cluster.nodes == 1:
        return [f"torchrun --nproc-per-node {cluster.devices_per_node} -m mlra_scale.train {arguments}"]
    # The file leaves to the planner what is not named.
    nothing = ["deepspeed={}"] if not candidate.config.deepspeed else []
    job = shlex.join([*start, *engine, *nothing, *more])
    return [
        f"sbatch --nodes {cluster.nodes} --gpus-per-node {cluster.devices_per_node} slurm/train_mlra_72L.sh {job}",
        f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node} --rdzv-backend c10d "
        f"--rdzv-endpoint HOST:29500 -m mlra_scale.train {arguments}",
    ]


def plain(candidate: Candidate) -> dict[str, Any]:
    """Returns a layout as plain values."""
    config, plan, time = candidate.config, candidate.plan, candidate.time
    return {
        "tensor": plan.tensor,
        "pipeline": plan.pipeline,
        "data": plan.data,
        "zero_stage": zero_stage(config),
        "engine": engine_kind(config),
        "ds_config": candidate.engine.file,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation_steps": plan.accumulation_steps,
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "low_rank_plan": low_rank_plan(config, plan),
        "sequence_parallel": config.parallel.sequence_parallel,
        "overrides": candidate.overrides(),
        "memory_bytes": {**asdict(candidate.memory), "device": candidate.memory.device},
        "largest_stage": candidate.stage,
        "step_seconds": time.seconds,
        "tokens_per_second": plan.tokens_per_step / time.seconds,
        "mfu": time.mfu,
        "bubble": time.bubble,
        "sent_bytes": time.sent,
        "stage_seconds": [asdict(stage) for stage in time.stages],
        "reduction_seconds": time.reduction,
        "update_seconds": time.update,
    }


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns rows of cells as lines, every column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
