"""What the planner found, as text and as plain values. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from mlra_scale.config import Config, engine_kind, zero_stage
from mlra_scale.console import table
from mlra_scale.model.low_rank_plan import low_rank_plan
from mlra_scale.model.update_rules import update_rules
from mlra_scale.planning.cluster import GIB, Cluster
from mlra_scale.planning.search import Candidate, SearchResult
from mlra_scale.planning.step_time import StepTime

COMPONENTS = ("weights", "gradients", "master", "moments", "activations", "logits", "temporary")


def found_text(found: SearchResult, cluster: Cluster, chosen: Candidate, top: int) -> str:
    """Returns the tables of the `top` fastest layouts and what was left out; the choice is marked and always shown."""
    shown = listed(found, chosen, top)
    return "\n".join(
        [
            *cluster_lines(cluster),
            "",
            f"{len(found.feasible)} layouts fit; the {min(top, len(found.feasible))} fastest by the estimate (not "
            "measured), and the planner's choice (*):",
            time_table(shown),
            *wrap(TIME_LEGEND, 116, subsequent_indent=" "),
            *wrap(optimizer_line(chosen.config, chosen.time), 116, subsequent_indent=" "),
            "",
            f"memory of a rank of the largest stage, GiB ({cluster.usable_memory / GIB:.1f} usable):",
            table(_MEMORY_HEADER, [_memory_row(number, each) for number, each in shown], left=0),
            "",
            *left_out_lines(found),
        ]
    )


def listed(found: SearchResult, chosen: Candidate, top: int) -> list[tuple[str, Candidate]]:
    """Returns the `top` fastest layouts and the choice, each with its number, which has a * where it is the choice."""
    numbered = [(f"{number}{'*' * (each is chosen)}", each) for number, each in enumerate(found.feasible, start=1)]
    return [*numbered[:top], *(each for each in numbered[top:] if each[1] is chosen)]


def optimizer_line(config: Config, time: StepTime) -> str:
    """Returns what the update of matrices by muon and spectron costs; empty where AdamW updates everything."""
    cost = time.matrices
    if cost is None:
        return ""
    rules = update_rules(config.model, config.optim).values()
    names = dict.fromkeys(rule.optimizer for rule in rules if not rule.is_adamw)
    share = 100 * cost.seconds / time.seconds
    return (
        f"{' and '.join(names)}: matrices take {1e3 * cost.seconds:.3g} ms of the step ({share:.1f} %; "
        f"products of Newton-Schulz {1e3 * cost.orthogonalisation:.3g} ms), in which a rank sends "
        f"{cost.sent / 1e9:.3g} GB in {cost.messages:.0f} messages and needs {cost.memory / GIB:.3g} GiB"
    )


TIME_LEGEND = (
    "(t x p x d: tensor, pipeline and data ranks; batch: micro-batch x accumulation; SP: sequence parallel; GB: what a "
    "rank sends in a step to ranks of each kind)"
)
_TIME_HEADER = (
    *("#", "t x p x d", "ZeRO", "batch", "recompute", "low-rank", "SP"),
    *("step s", "tokens/s", "MFU %", "bubble", "GB: t", "GB: p", "GB: d"),
)
_MEMORY_HEADER = ("#", *COMPONENTS, "sum", "stage", "host")


def cluster_lines(cluster: Cluster) -> list[str]:
    """Returns what was assumed of the cluster."""
    return [
        f"cluster {cluster.name}: {cluster.nodes} node(s) of {cluster.devices_per_node} device(s), "
        f"{cluster.memory / GIB:.1f} GiB each, peak {cluster.peak_flops / 1e12:.4g} TFLOP/s of which matrix products "
        f"reach {100 * cluster.utilization:.0f} %,",
        f"links {8 * cluster.link_intra / 1e9:.4g} Gbit/s within a node and {8 * cluster.link_inter / 1e9:.4g} between "
        "nodes",
        *wrap(f"({cluster.source})", 116, subsequent_indent=" "),
    ]


def time_table(candidates: Iterable[tuple[str, Candidate]]) -> str:
    """Returns the table of times of layouts, each with its number; at most 116 columns wide."""
    return table(_TIME_HEADER, [_time_row(number, each) for number, each in candidates], left=0, width=116)


def _time_row(number: str, candidate: Candidate) -> tuple[str, ...]:
    plan, time = candidate.plan, candidate.time
    factorised = any(candidate.config.model.is_factorised(name) for name in "qkv")
    return (
        *(number, f"{plan.tensor}x{plan.pipeline}x{plan.data}", str(zero_stage(candidate.config))),
        f"{plan.micro_batch_size} x {plan.accumulation_steps}",
        candidate.config.parallel.activation_checkpointing,
        low_rank_plan(candidate.config, plan) if factorised and plan.tensor > 1 else "-",
        ("yes" if candidate.config.parallel.sequence_parallel else "no") if plan.tensor > 1 else "-",
        f"{time.seconds:.4g}",
        f"{plan.tokens_per_step / time.seconds:.4g}",
        f"{100 * time.mfu:.1f}",
        f"{100 * time.bubble:.1f} %",
        *(f"{time.sent[kind] / 1e9:.3g}" for kind in ("tensor", "pipeline", "data")),
    )


def _memory_row(number: str, candidate: Candidate) -> tuple[str, ...]:
    memory = candidate.memory
    parts = [getattr(memory, name) / GIB for name in COMPONENTS]
    numbers = (f"{part:.2f}" for part in (*parts, memory.device / GIB))
    return (number, *numbers, str(candidate.stage), f"{(memory.host + memory.snapshot) / GIB:.2f}")


def left_out_lines(found: SearchResult) -> list[str]:
    """Returns how many layouts were left out, and why."""
    if not found.left_out:
        return ["left out: none"]
    return ["left out:", *(f"  {count:>5}  {reason}" for reason, count in found.left_out.most_common())]


def nothing_fits(found: SearchResult, cluster: Cluster) -> str:
    """Returns the message where no layout fits: the smallest need, and what would help."""
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
    """Returns the command lines that train a layout on a cluster.

    Args:
        candidate: The layout.
        cluster: Several nodes are started by sbatch, or by torchrun on each.
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
        "matrices": None if time.matrices is None else asdict(time.matrices),
    }
