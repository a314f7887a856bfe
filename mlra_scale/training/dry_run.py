"""Every derived number of a run, as text: for --dry-run, and in short before the first step. Imports no torch."""

from __future__ import annotations

from textwrap import wrap

from mlra_scale.config import BatchPlan, Config, ConfigError, engine_kind, zero_stage
from mlra_scale.config.json_text import printable
from mlra_scale.model.low_rank_plan import low_rank_plan
from mlra_scale.planning.choice import LayoutChoice, choice_lines, comparison_line
from mlra_scale.planning.cluster import GIB, Cluster
from mlra_scale.planning.layout import (
    blocks_of_stage,
    data_groups,
    num_held,
    pipeline_groups,
    rank_of,
    tensor_groups,
    weights_of_stage,
)
from mlra_scale.planning.memory import RankMemory, rank_memory
from mlra_scale.planning.plan_text import COMPONENTS, aligned
from mlra_scale.planning.step_time import step_time
from mlra_scale.training.layout import Devices, best, cluster_for, devices_unseen

_GROUPS_SHOWN = 8


def plan_report(
    config: Config, plan: BatchPlan, layout: LayoutChoice | None = None, devices: Devices | None = None
) -> str:
    """Returns the whole plan of a run.

    Args:
        config: A validated configuration.
        plan: Its batch plan; the ranks need not exist.
        layout: How its layout was chosen; None: everything was named.
        devices: What it is for; None: what can be said without seeing them.
    """
    devices = devices or devices_unseen(config, plan.world_size)
    sections = [
        ("Model", _model_lines(config)),
        ("Batch", _batch_lines(config, plan)),
        ("Mesh", _mesh_lines(config, plan)),
        ("Parameters per rank", _parameter_lines(config, plan)),
        ("Memory per rank, GiB", _memory_lines(config, plan)),
        ("Estimate of a step, not measured", _estimate_lines(config, plan, devices, layout)),
    ]
    if layout is not None:
        sections.insert(0, ("Layout, chosen by the planner", choice_lines(layout)))
    elif config.parallel.layout == "auto":
        nothing = "parallel.layout=auto has nothing to choose: every field of the layout is named"
        sections.insert(0, ("Layout", [nothing]))
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def short_report(config: Config, plan: BatchPlan, resolved_device: str) -> str:
    """Returns the lines that a run prints before its first step.

    Args:
        config: A validated configuration.
        plan: Its batch plan.
        resolved_device: "cpu" or "cuda".
    """
    lines = [*_model_lines(config), *_batch_lines(config, plan), _layout_line(config, plan)]
    lines += _low_rank_lines(config, plan, resolved_device)
    return "\n".join(lines)


def _model_lines(config: Config) -> list[str]:
    model = config.model
    attention: str = model.attention
    if attention == "mlra":
        attention += f" rank {model.rank} of {model.hidden_size} in {', '.join(model.factorised_projections)}"
    counts = model.parameter_counts()
    ends = counts["embedding"] + counts["positions"]
    flops = model.flops_per_token(config.train.sequence_length)
    tokens_per_step = config.train.global_batch_size * config.train.sequence_length
    return [
        f"{printable(config.preset or 'model')}: {model.num_layers} layers, width {model.hidden_size}, "
        f"{model.num_heads} heads, attention {attention}",
        f"parameters {model.num_parameters():,} (embedding {counts['embedding']:,}, positions {counts['positions']:,}, "
        f"rest {model.num_parameters() - ends:,}), tied head counted once",
        f"FLOPs per token {flops:.4g}, per step {flops * tokens_per_step:.4g}",
    ]


def _batch_lines(config: Config, plan: BatchPlan) -> list[str]:
    total = plan.tokens_per_step * config.train.steps
    return [
        f"global batch {plan.global_batch_size} = {plan.micro_batch_size} (micro-batch) x {plan.accumulation_steps} "
        f"(accumulation) x {plan.data} (data ranks), sequences of {plan.sequence_length}",
        f"tokens per step {plan.tokens_per_step:,}, steps {config.train.steps:,}, total tokens {total:,}",
    ]


def _layout_line(config: Config, plan: BatchPlan) -> str:
    split = " (sequence parallel)" if config.parallel.sequence_parallel else ""
    return (
        f"{plan.world_size} rank(s): tensor {plan.tensor}{split} x pipeline {plan.pipeline} x data {plan.data}, "
        f"{engine_kind(config)} engine, ZeRO {zero_stage(config)}, {config.train.precision}"
    )


def _mesh_lines(config: Config, plan: BatchPlan) -> list[str]:
    lines = [_layout_line(config, plan), *_low_rank_lines(config, plan)]
    for name, groups in (
        ("tensor", tensor_groups(plan)),
        ("pipeline", pipeline_groups(plan)),
        ("data", data_groups(plan)),
    ):
        shown = " ".join(_ranks(group) for group in groups[:_GROUPS_SHOWN])
        more = f" ... ({len(groups)} groups)" if len(groups) > _GROUPS_SHOWN else ""
        lines.append(f"{name + ' groups':<16} {shown}{more}")
    for stage in range(plan.pipeline):
        blocks = blocks_of_stage(config.model.num_layers, plan.pipeline, stage)
        first = rank_of(plan, stage, 0, 0)
        last = rank_of(plan, stage, plan.data - 1, plan.tensor - 1)
        lines.append(f"{f'stage {stage}':<16} ranks {first}-{last}, blocks {blocks.start}-{blocks.stop - 1}")
    return lines


def _low_rank_lines(config: Config, plan: BatchPlan, resolved_device: str | None = None) -> list[str]:
    """Says how factorised q, k, v are computed, where that is not as in one process: one factor after the other."""
    chosen, asked = low_rank_plan(config, plan, resolved_device), config.parallel.low_rank_plan
    is_factorised = any(config.model.is_factorised(name) for name in "qkv")
    if not is_factorised or (plan.tensor == 1 and chosen == "replicated"):
        return []
    return [f"{'low-rank plan':<16} {chosen}{' (chosen by the cost model)' if asked == 'auto' else ''}"]


def _ranks(group: list[int]) -> str:
    """Writes a group of ranks in brackets; evenly spaced long ones as first, second, ..., last."""
    if len(group) > 8:
        return f"[{group[0]} {group[1]} .. {group[-1]}]"
    return "[" + " ".join(str(rank) for rank in group) + "]"


def _parameter_lines(config: Config, plan: BatchPlan) -> list[str]:
    rows: list[tuple[str, ...]] = [("stage", "tp shard", "total", "embedding", "rest")]
    for stage in range(plan.pipeline):
        held = weights_of_stage(config.model, plan.pipeline, stage)
        total = num_held(held, plan.tensor)
        embedding = num_held([info for info in held if info.kind == "embedding"], plan.tensor)
        shard = "whole" if plan.tensor == 1 else f"1/{plan.tensor}"
        rows.append((str(stage), shard, f"{total:,}", f"{embedding:,}", f"{total - embedding:,}"))
    lines = aligned(rows)
    padding = config.model.padded_vocab_size - config.model.vocab_size
    lines.append(f"(every tensor rank of a stage alike; with {padding} padded rows of the vocabulary)")
    if plan.pipeline > 1:
        lines.append("(the last stage holds its own copy of the tied embedding)")
    return lines


def _memory_lines(config: Config, plan: BatchPlan) -> list[str]:
    names = (*COMPONENTS, "device", "host", "snapshot")
    rows: list[tuple[str, ...]] = [("stage", *COMPONENTS, "sum", "host", "snapshot")]
    estimates = [rank_memory(config, plan, stage) for stage in range(plan.pipeline)]
    for stage, memory in enumerate(estimates):
        rows.append((str(stage), *(_gib(memory, name) for name in names)))
    checkpointing = config.parallel.activation_checkpointing
    other = "none" if checkpointing == "block" else "block"
    section = config.parallel.model_copy(update={"activation_checkpointing": other})
    changed = config.model_copy(update={"parallel": section})
    peak = max(rank_memory(changed, plan, stage).device for stage in range(plan.pipeline))
    return [
        *aligned(rows),
        f"(activation checkpointing: {checkpointing}; with {other} the largest sum would be {peak / GIB:.2f})",
        "(host: what is offloaded; snapshot: host memory from which a checkpoint is written while training goes on, 0",
        " with checkpoint.asynchronous=false)",
        "(at the moment of a step that needs most; checked against all tensors of ranks on CPUs; the libraries",
        " themselves and their communication buffers come on top)",
        "(formulas: mlra_scale/planning/memory.py)",
    ]


def _estimate_lines(config: Config, plan: BatchPlan, devices: Devices, layout: LayoutChoice | None) -> list[str]:
    """What the planner expects of a step on these devices, and how that compares with its best layout."""
    cluster = cluster_for(config, devices)
    time = step_time(config, plan, cluster)
    sent = ", ".join(f"{kind} {nbytes / 1e9:.3g}" for kind, nbytes in time.sent.items())
    comparison = ""
    if layout is None or layout.kept:
        try:
            comparison = comparison_line(time.seconds, best(config, devices))
        except ConfigError as error:
            comparison = f"the planner has no layout to compare it with: {error.problems[0].remedy}"
    if not_fitting := _not_fitting(config, plan, cluster):
        comparison = f"{not_fitting}; {comparison}" if comparison else not_fitting
    return [
        f"on {cluster.nodes} x {cluster.devices_per_node} {cluster.name}: step {time.seconds:.3g} s, "
        f"{plan.tokens_per_step / time.seconds:,.0f} tokens/s, MFU {100 * time.mfu:.1f} %, bubble "
        f"{100 * time.bubble:.1f} %",
        f"GB that a rank sends per step: {sent}",
        *wrap(comparison, 112),
        *wrap(f"({cluster.source})", 112, subsequent_indent=" "),
        "(formulas: mlra_scale/planning/step_time.py; other layouts and clusters: python tools/plan.py)",
    ]


def _not_fitting(config: Config, plan: BatchPlan, cluster: Cluster) -> str:
    """Says that a layout does not fit into the memory of its devices; nothing if it does."""
    need = max(rank_memory(config, plan, stage).device for stage in range(plan.pipeline))
    if need <= cluster.usable_memory:
        return ""
    usable = max(0.0, cluster.usable_memory) / GIB
    return f"it does not fit: {need / GIB:.2f} GiB of tensors, {usable:.2f} GiB of {cluster.memory / GIB:.2f} usable"


def _gib(memory: RankMemory, name: str) -> str:
    return f"{getattr(memory, name) / GIB:.2f}"
