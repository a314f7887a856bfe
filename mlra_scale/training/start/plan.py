"""The layout of a start: the cluster that the planner plans for, its choice, and the plan as text. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from mlra_scale.config import (
    BatchPlan,
    Config,
    ConfigError,
    Named,
    Problem,
    engine_kind,
    zero_stage,
)
from mlra_scale.config.json_text import printable
from mlra_scale.console import table
from mlra_scale.model.low_rank_plan import low_rank_plan
from mlra_scale.model.optim_text import optimizer_text, rule_text
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import matches
from mlra_scale.planning.choice import FIELDS, RECORD, LayoutChoice, choice_lines, choose, comparison_line
from mlra_scale.planning.cluster import GIB, Cluster, generation_of_device, named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file
from mlra_scale.planning.layout import AXES, blocks_of_stage, groups_along, num_held, rank_of, weights_of_stage
from mlra_scale.planning.memory import rank_memory
from mlra_scale.planning.plan_text import COMPONENTS, optimizer_line
from mlra_scale.planning.search import changed
from mlra_scale.planning.step_time import step_time
from mlra_scale.training.start.device import Devices, devices_elsewhere


def cluster_for(config: Config, devices: Devices) -> Cluster:
    """Returns the planner's constants, measured or of these devices, with the number of the devices.

    cluster.file, cluster.device and cluster.device_memory_gib override what is seen.

    Raises:
        ConfigError: cluster.file cannot be used, or cluster.device is of another kind than the devices.
    """
    cluster = _measured(config, devices.kind) if config.cluster.file is not None else _named(config, devices)
    per_node = devices.per_node or cluster.devices_per_node
    per_node = max(number for number in range(1, per_node + 1) if devices.number % number == 0)
    given = config.cluster.device_memory_gib
    memory = devices.memory if given is None else given * GIB
    return replace(
        cluster,
        nodes=devices.number // per_node,
        devices_per_node=per_node,
        memory=cluster.memory if memory is None else memory,
    )


def _named(config: Config, devices: Devices) -> Cluster:
    given = config.cluster.device
    if given is not None and (given == "cpu") != (devices.kind == "cpu"):
        remedy = f"this is for {devices.kind} (train.device); name a device of that kind, or none"
        raise ConfigError([Problem("cluster.device", given, remedy)])
    if given is not None or devices.kind == "cpu":
        return named_cluster(given or "cpu")
    cluster = named_cluster("h100" if devices.name is None else generation_of_device(devices.name) or "h100")
    if devices.name is None or devices.is_known():
        return cluster
    name = f"{printable(devices.name)}, for which the planner has no constants: those of {cluster.name}"
    return replace(cluster, name=f"({name})")


def _measured(config: Config, kind: str) -> Cluster:
    assert config.cluster.file is not None
    cluster = read_cluster_file(Path(config.cluster.file), "cluster.file")
    remedy = None
    if config.cluster.device is not None:
        remedy = f"holds the constants of a device, and so does cluster.device={config.cluster.device}; leave one out"
    elif cluster.runs_ahead != (kind == "cuda"):
        others = "GPUs" if cluster.runs_ahead else "CPUs"
        remedy = f"was measured on {others}, and this is planned for {kind}; name a file of such devices, or none"
    if remedy is not None:
        raise ConfigError([Problem("cluster.file", config.cluster.file, remedy)])
    return cluster


def resolve_layout(config: Config, named: Named, devices: Devices) -> tuple[Config, LayoutChoice | None]:
    """Returns the configuration with its layout, and how the planner chose it; named fields stay as they are.

    The choice is None where there was nothing to choose: parallel.layout is manual, every field of the layout is named,
    or a cluster job has chosen for its ranks.

    Raises:
        ConfigError: No layout passes the validation, none fits, or a field of the cluster is wrong.
    """
    cluster = cluster_for(config, devices)
    if not is_layout_open(config, named):
        return config, None
    choice = choose(config, named, cluster)
    is_chosen = choice.kept != FIELDS or choice.chosen.config.deepspeed != config.deepspeed
    return choice.chosen.config, choice if is_chosen else None


def is_layout_open(config: Config, named: Named) -> bool:
    """Returns whether the planner has to choose: not where the layout is manual or was chosen for this start."""
    return config.parallel.layout == "auto" and not named.on_command_line >= {*FIELDS, RECORD}


def with_layout_of(chosen: Config, config: Config, named: Named) -> tuple[Config, Named]:
    """Returns a configuration with the layout of `chosen`, whose fields count as named from then on."""
    sections: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}, "deepspeed": chosen.deepspeed}
    for name in (*FIELDS, RECORD):
        section, _, field = name.partition(".")
        if field:
            sections[section][field] = getattr(getattr(chosen, section), field)
    return changed(config, sections), Named(named.on_command_line | {*FIELDS, RECORD}, named.in_file)


def best_layout(config: Config, devices: Devices) -> LayoutChoice:
    """Returns what the planner would choose if no field of the layout were named.

    Raises:
        ConfigError: No layout passes the validation, or none fits.
    """
    config = changed(config, {"parallel": {"named_layout_fields": None}})
    return choose(config, Named(), cluster_for(config, devices))


_GROUPS_SHOWN = 8


def plan_report(
    config: Config, plan: BatchPlan, layout: LayoutChoice | None = None, devices: Devices | None = None
) -> str:
    """Returns the whole plan of a run, whose ranks need not exist; devices None: those that the configuration names."""
    devices = devices or devices_elsewhere(config, plan.world_size)
    sections = [
        ("Model", _model_lines(config)),
        ("Batch", _batch_lines(config, plan)),
        ("Optimizer", _optimizer_lines(config)),
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
    """Returns the lines that a run prints before its first step; `resolved_device` is "cpu" or "cuda"."""
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
    lines = [
        f"{printable(config.preset or 'model')}: {model.num_layers} layers, width {model.hidden_size}, "
        f"{model.num_heads} heads, attention {attention}",
        f"parameters {model.num_parameters():,} (embedding {counts['embedding']:,}, positions {counts['positions']:,}, "
        f"rest {model.num_parameters() - ends:,}), tied head counted once",
        f"FLOPs per token {flops:.4g}, per step {flops * tokens_per_step:.4g}",
    ]
    if model.depth_rule != "none":
        factor = f"{model.base_depth}/{model.num_layers} = {model.branch_factor:.4g}"
        lines.append(f"depth rule {model.depth_rule}: branches times {factor} (model.base_depth / model.num_layers)")
    return lines


def _batch_lines(config: Config, plan: BatchPlan) -> list[str]:
    total = plan.tokens_per_step * config.train.steps
    return [
        f"global batch {plan.global_batch_size} = {plan.micro_batch_size} (micro-batch) x {plan.accumulation_steps} "
        f"(accumulation) x {plan.data} (data ranks), sequences of {plan.sequence_length}",
        f"tokens per step {plan.tokens_per_step:,}, steps {config.train.steps:,}, total tokens {total:,}",
    ]


def _optimizer_lines(config: Config) -> list[str]:
    """Returns the optimizers, and what each rule matches; * stands for the numbers of several blocks."""
    model, optim = config.model, config.optim
    table = ParameterTable(model)
    lines = [
        optimizer_text(model, optim),
        f"weight decay {optim.weight_decay:g}, none on biases and norms{' but by rules' * bool(optim.rules)}",
    ]
    for index, rule in enumerate(optim.rules):
        names = matches(rule, table)
        number = (
            f"{len(names)} parameter{'s' * (len(names) != 1)}, {sum(table[name].numel() for name in names):,} weights"
        )
        lines.append(f"optim.rules.{index}: {printable(rule_text(rule))} ({number}: {', '.join(_short(names))})")
    return [part for line in lines for part in wrap(line, 112, subsequent_indent="  ", break_on_hyphens=False)]


def _short(names: list[str]) -> list[str]:
    """Returns names of parameters, with * for the number of the block where several blocks have the same one."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(re.sub(r"^blocks\.\d+", "blocks.*", name), []).append(name)
    return [form if len(of) > 1 else of[0] for form, of in forms.items()]


def _layout_line(config: Config, plan: BatchPlan) -> str:
    split = " (sequence parallel)" if config.parallel.sequence_parallel else ""
    return (
        f"{plan.world_size} rank(s): tensor {plan.tensor}{split} x pipeline {plan.pipeline} x data {plan.data}, "
        f"{engine_kind(config)} engine, ZeRO {zero_stage(config)}, {config.train.precision}"
    )


def _mesh_lines(config: Config, plan: BatchPlan) -> list[str]:
    lines = [_layout_line(config, plan), *_low_rank_lines(config, plan)]
    for axis in AXES:
        groups = groups_along(plan, axis)
        shown = " ".join(_ranks(group) for group in groups[:_GROUPS_SHOWN])
        more = f" ... ({len(groups)} groups)" if len(groups) > _GROUPS_SHOWN else ""
        lines.append(f"{axis + ' groups':<16} {shown}{more}")
    for stage in range(plan.pipeline):
        blocks = blocks_of_stage(config.model.num_layers, plan.pipeline, stage)
        first = rank_of(plan, stage, 0, 0)
        last = rank_of(plan, stage, plan.data - 1, plan.tensor - 1)
        lines.append(f"{f'stage {stage}':<16} ranks {first}-{last}, blocks {blocks.start}-{blocks.stop - 1}")
    return lines


def _low_rank_lines(config: Config, plan: BatchPlan, resolved_device: str | None = None) -> list[str]:
    """Returns how factorised q, k, v are computed, where that differs from one process: one factor after the other."""
    chosen, requested = low_rank_plan(config, plan, resolved_device), config.parallel.low_rank_plan
    is_factorised = any(config.model.is_factorised(name) for name in "qkv")
    if not is_factorised or (plan.tensor == 1 and chosen == "replicated"):
        return []
    return [f"{'low-rank plan':<16} {chosen}{' (chosen by the cost model)' if requested == 'auto' else ''}"]


def _ranks(group: list[int]) -> str:
    """Writes a group of ranks in brackets; evenly spaced long ones as first, second, ..., last."""
    if len(group) > 8:
        return f"[{group[0]} {group[1]} .. {group[-1]}]"
    return "[" + " ".join(str(rank) for rank in group) + "]"


def _parameter_lines(config: Config, plan: BatchPlan) -> list[str]:
    rows = []
    for stage in range(plan.pipeline):
        held = weights_of_stage(config.model, plan.pipeline, stage)
        total = num_held(held, plan.tensor)
        embedding = num_held([info for info in held if info.kind == "embedding"], plan.tensor)
        shard = "whole" if plan.tensor == 1 else f"1/{plan.tensor}"
        rows.append((str(stage), shard, f"{total:,}", f"{embedding:,}", f"{total - embedding:,}"))
    lines = table(("stage", "tp shard", "total", "embedding", "rest"), rows, left=0).splitlines()
    padding = config.model.padded_vocab_size - config.model.vocab_size
    lines.append(f"(every tensor rank of a stage alike; with {padding} padded rows of the vocabulary)")
    if plan.pipeline > 1:
        lines.append("(the last stage holds its own copy of the tied embedding)")
    return lines


def _memory_lines(config: Config, plan: BatchPlan) -> list[str]:
    names = (*COMPONENTS, "device", "host", "snapshot")
    memories = [rank_memory(config, plan, stage) for stage in range(plan.pipeline)]
    rows = [
        (str(stage), *(f"{getattr(memory, name) / GIB:.2f}" for name in names)) for stage, memory in enumerate(memories)
    ]
    checkpointing = config.parallel.activation_checkpointing
    other = "none" if checkpointing == "block" else "block"
    peak = _largest_memory(changed(config, {"parallel": {"activation_checkpointing": other}}), plan)
    return [
        *table(("stage", *COMPONENTS, "sum", "host", "snapshot"), rows, left=0).splitlines(),
        f"(activation checkpointing: {checkpointing}; with {other} the largest sum would be {peak / GIB:.2f})",
        "(host: what is offloaded; snapshot: host memory from which a checkpoint is written during training, 0 with",
        " checkpoint.asynchronous=false)",
        "(at the peak of a step; checked against all tensors of ranks on CPUs; the libraries themselves and their",
        " communication buffers are not included)",
        "(formulas: mlra_scale/planning/memory.py)",
    ]


def _largest_memory(config: Config, plan: BatchPlan) -> float:
    return max(rank_memory(config, plan, stage).device for stage in range(plan.pipeline))


def _estimate_lines(config: Config, plan: BatchPlan, devices: Devices, layout: LayoutChoice | None) -> list[str]:
    """Returns the planner's estimate of a step on these devices, and how it compares with the best layout."""
    cluster = cluster_for(config, devices)
    time = step_time(config, plan, cluster)
    sent = ", ".join(f"{kind} {nbytes / 1e9:.3g}" for kind, nbytes in time.sent.items())
    comparison = ""
    if layout is None or layout.kept:
        try:
            comparison = comparison_line(time.seconds, best_layout(config, devices))
        except ConfigError as error:
            comparison = f"the planner has no layout to compare it with: {error.problems[0].remedy}"
    if not_fitting := _not_fitting(config, plan, cluster):
        comparison = f"{not_fitting}; {comparison}" if comparison else not_fitting
    return [
        f"on {cluster.nodes} x {cluster.devices_per_node} {cluster.name}: step {time.seconds:.3g} s, "
        f"{plan.tokens_per_step / time.seconds:,.0f} tokens/s, MFU {100 * time.mfu:.1f} %, bubble "
        f"{100 * time.bubble:.1f} %",
        *wrap(optimizer_line(config, time), 112),
        f"GB that a rank sends per step: {sent}",
        *wrap(comparison, 112),
        *wrap(f"({cluster.source})", 112, subsequent_indent=" "),
        "(formulas: mlra_scale/planning/step_time.py; other layouts and clusters: mlra-scale plan)",
    ]


def _not_fitting(config: Config, plan: BatchPlan, cluster: Cluster) -> str:
    """Returns by how much a layout exceeds the memory of its devices; empty if it fits."""
    need = _largest_memory(config, plan)
    if need <= cluster.usable_memory:
        return ""
    usable = max(0.0, cluster.usable_memory) / GIB
    return f"it does not fit: {need / GIB:.2f} GiB of tensors, {usable:.2f} GiB of {cluster.memory / GIB:.2f} usable"
