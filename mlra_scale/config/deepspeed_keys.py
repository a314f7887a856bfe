"""Which of DeepSpeed's configuration keys belongs to whom.

DeepSpeed's JSON mixes engine knobs (ZeRO stage, buckets, offload) with choices that have another owner in this project
(batch sizes, precision, clipping, optimizer). Two owners of one truth drift apart, so a file that sets ours is refused,
with the place where to set it. `TABLES` is the one table; docs/configuration.md shows it.
"""

from __future__ import annotations

from typing import Any

from mlra_scale.config.problems import Problem, nearest

YOURS = "yours"
OURS = "ours"
REFUSED = "refused"

_MEAN_LOSS = "gradients are those of the mean loss; leave it out"
_PROFILE = "set profile.start and profile.stop"
_METRICS = "metrics go to metrics.jsonl; leave it out"
_BATCHES = "batches come from the data section; leave it out"
_REMOVED = "DeepSpeed has removed it"
_OWN_CHECKPOINTS = "checkpoints have their own writer and reader; leave it out"
_NO_EXPERTS = "there are no experts in this model"
_NO_ULYSSES = (
    "it is DeepSpeed's Ulysses, which splits the sequence over ranks of its own; to split it over the tensor-parallel "
    "ranks, set parallel.sequence_parallel"
)

# key -> (owner, kind of value for yours / where to set it for ours / why not for refused)
TOP_LEVEL_KEYS: dict[str, tuple[str, str]] = {
    "zero_optimization": (YOURS, "mapping"),
    "communication_data_type": (YOURS, "fp32|bf16|fp16"),
    "comms_logger": (YOURS, "mapping"),
    "pipeline": (YOURS, "mapping"),
    "memory_breakdown": (YOURS, "bool"),
    "dump_state": (YOURS, "bool"),
    "disable_python_gc": (YOURS, "bool"),
    "log_level": (YOURS, "debug|info|warning|error|critical"),
    "train_batch_size": (OURS, "set train.global_batch_size"),
    "train_micro_batch_size_per_gpu": (OURS, "set train.micro_batch_size"),
    "gradient_accumulation_steps": (OURS, "follows from train.global_batch_size, train.micro_batch_size and the ranks"),
    "managed_gradient_accumulation": (OURS, "follows from train.global_batch_size and train.micro_batch_size"),
    "fp16": (OURS, "set train.precision"),
    "bf16": (OURS, "set train.precision"),
    "bfloat16": (OURS, "set train.precision"),
    "torch_autocast": (OURS, "set train.precision"),
    "data_types": (OURS, "follows from train.precision: gradients accumulate in fp32 where DeepSpeed can"),
    "gradient_clipping": (OURS, "set optim.grad_clip"),
    "optimizer": (OURS, "set optim.lr, optim.betas, optim.eps and optim.weight_decay"),
    "scheduler": (OURS, "set optim.schedule, optim.warmup_steps and optim.decay_steps"),
    "zero_allow_untested_optimizer": (OURS, "the optimizer is built here; leave it out"),
    "zero_force_ds_cpu_optimizer": (OURS, "follows from zero_optimization.offload_optimizer; leave it out"),
    "gradient_allreduce_op": (OURS, _MEAN_LOSS),
    "prescale_gradients": (OURS, _MEAN_LOSS),
    "gradient_predivide_factor": (OURS, _MEAN_LOSS),
    "activation_checkpointing": (OURS, "set parallel.activation_checkpointing"),
    "tensor_parallel": (OURS, "set parallel.tensor"),
    "vocabulary_size": (OURS, "set model.vocab_size"),
    "steps_per_print": (OURS, "set train.log_every"),
    "wall_clock_breakdown": (OURS, _PROFILE),
    "flops_profiler": (OURS, _PROFILE),
    "tensorboard": (OURS, _METRICS),
    "wandb": (OURS, "set wandb.mode and wandb.project"),
    "csv_monitor": (OURS, _METRICS),
    "comet": (OURS, _METRICS),
    "checkpoint": (OURS, "set checkpoint.every and checkpoint.keep_last"),
    "timers": (OURS, "the throughput timer waits for the device at every step; tokens per second are logged anyway"),
    "dataloader_drop_last": (OURS, _BATCHES),
    "data_efficiency": (OURS, _BATCHES),
    "sequence_parallel_size": (REFUSED, _NO_ULYSSES),
    "data_parallel_size": (REFUSED, "it follows from the number of ranks, parallel.tensor and parallel.pipeline"),
    "seq_parallel_communication_data_type": (REFUSED, _NO_ULYSSES),
    "expert_parallel": (REFUSED, _NO_EXPERTS),
    "use_data_before_expert_parallelism": (REFUSED, _NO_EXPERTS),
    "aio": (REFUSED, "it is for state on NVMe, which is out of reach of TEV and checkpoints; offload to cpu"),
    "compile": (
        REFUSED,
        "it is DeepCompile, which rewrites the graph and is not tested here; for torch.compile set train.compile",
    ),
    "autotuning": (REFUSED, "it starts runs of its own; tools/plan.py chooses a layout"),
    "hybrid_engine": (REFUSED, "it is for generation inside training"),
    "weight_quantization": (REFUSED, "it is for inference"),
    "datastates": (OURS, _OWN_CHECKPOINTS),
    "disable_allgather": (REFUSED, "without it ranks would keep different weights"),
    "amp": (REFUSED, "DeepSpeed has removed it; set train.precision"),
    "elasticity": (REFUSED, "DeepSpeed has removed it; set train.global_batch_size"),
    "sparse_gradients": (REFUSED, _REMOVED),
    "sparse_attention": (REFUSED, _REMOVED),
    "compression_training": (REFUSED, _REMOVED),
    "quantize_training": (REFUSED, _REMOVED),
    "curriculum_learning": (REFUSED, _REMOVED),
    "progressive_layer_drop": (REFUSED, _REMOVED),
    "eigenvalue": (REFUSED, _REMOVED),
    "graph_harvesting": (REFUSED, _REMOVED),
    "nebula": (REFUSED, _REMOVED),
}

# DeepSpeed takes each of these with and without the prefix; one spelling is enough to read.
_STAGE_3_KINDS = {
    "stage3_prefetch_bucket_size": "count",
    "stage3_param_persistence_threshold": "count",
    "stage3_model_persistence_threshold": "count",
    "stage3_max_live_parameters": "count",
    "stage3_max_reuse_distance": "count",
    "stage3_module_granularity_threshold": "count",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "stage3_allgather_sequential": "bool",
}

ZERO_KEYS: dict[str, tuple[str, str]] = {
    "stage": (YOURS, "0|1|2|3"),
    "contiguous_gradients": (YOURS, "bool"),
    "reduce_scatter": (YOURS, "bool"),
    "reduce_bucket_size": (YOURS, "positive count"),
    "use_multi_rank_bucket_allreduce": (YOURS, "bool"),
    "allgather_partitions": (YOURS, "bool"),
    "allgather_bucket_size": (YOURS, "count"),
    "overlap_comm": (YOURS, "bool"),
    "round_robin_gradients": (
        REFUSED,
        "it reorders the flat partitions, so that TEV and checkpoints would misplace weights",
    ),
    "parameter_alignment": (YOURS, "bool"),
    "ignore_unused_parameters": (YOURS, "bool"),
    "offload_optimizer": (YOURS, "mapping"),
    "offload_param": (YOURS, "mapping"),
    "sub_group_size": (YOURS, "count"),
    **{name: (YOURS, kind) for name, kind in _STAGE_3_KINDS.items()},
    "memory_efficient_linear": (YOURS, "bool"),
    "override_module_apply": (YOURS, "bool"),
    "log_trace_cache_warnings": (YOURS, "bool"),
    "enable_sanity_checks": (YOURS, "bool"),
    "compute_grad_norm": (OURS, "the gradient norm is logged and guards every update; leave it out"),
    "load_from_fp32_weights": (OURS, _OWN_CHECKPOINTS),
    "gather_16bit_weights_on_model_save": (OURS, _OWN_CHECKPOINTS),
    "stage3_gather_16bit_weights_on_model_save": (OURS, _OWN_CHECKPOINTS),
    "stage3_gather_fp16_weights_on_model_save": (OURS, _OWN_CHECKPOINTS),
    **{name.removeprefix("stage3_"): (REFUSED, f"write {name}") for name in _STAGE_3_KINDS},
    "cpu_offload": (REFUSED, "deprecated by DeepSpeed; write offload_optimizer: {device: cpu}"),
    "cpu_offload_param": (REFUSED, "deprecated by DeepSpeed; write offload_param: {device: cpu}"),
    "cpu_offload_use_pin_memory": (REFUSED, "deprecated by DeepSpeed; write offload_optimizer: {pin_memory: true}"),
    "elastic_checkpoint": (OURS, _OWN_CHECKPOINTS),
    "legacy_stage1": (REFUSED, "DeepSpeed does not read it any more; leave it out"),
    "pipeline_loading_checkpoint": (OURS, _OWN_CHECKPOINTS),
    "zero_hpz_partition_size": (REFUSED, "its groups cut the whole world and know nothing of tensor parallelism"),
    "zero_quantized_weights": (REFUSED, "quantized weights break the equality of layouts"),
    "zero_quantized_gradients": (REFUSED, "quantized gradients break the equality of layouts"),
    "zenflow": (REFUSED, "it brings an optimizer of its own"),
    "zero_quantized_nontrainable_weights": (REFUSED, "every weight is trained"),
    "save_muon_momentum_buffer_in_memory": (REFUSED, "the optimizer is AdamW"),
    "leaf_module": (REFUSED, _NO_EXPERTS),
    "mics_shard_size": (REFUSED, _REMOVED),
    "mics_hierarchical_params_gather": (REFUSED, _REMOVED),
    "zeropp_loco_param": (REFUSED, _REMOVED),
}

_NVME = "state on NVMe is out of reach of TEV and checkpoints; offload to cpu"

OFFLOAD_OPTIMIZER_KEYS: dict[str, tuple[str, str]] = {
    "device": (YOURS, "none|cpu"),
    "pin_memory": (YOURS, "bool"),
    "nvme_path": (REFUSED, _NVME),
    "buffer_count": (REFUSED, _NVME),
    "pipeline_read": (REFUSED, _NVME),
    "pipeline_write": (REFUSED, _NVME),
    "fast_init": (REFUSED, _NVME),
    "ratio": (REFUSED, "an optimizer state in two places is out of reach of TEV and checkpoints; offload it whole"),
    "super_offload": (REFUSED, "it brings an optimizer of its own"),
    "cpuadam_cores_perc": (REFUSED, "it is read only by super_offload"),
}

OFFLOAD_PARAM_KEYS: dict[str, tuple[str, str]] = {
    "device": (YOURS, "none|cpu"),
    "pin_memory": (YOURS, "bool"),
    "nvme_path": (REFUSED, _NVME),
    "buffer_count": (REFUSED, _NVME),
    "buffer_size": (REFUSED, _NVME),
    "max_in_cpu": (REFUSED, _NVME),
}

PIPELINE_KEYS: dict[str, tuple[str, str]] = {
    "pipe_partitioned": (YOURS, "bool"),
    "grad_partitioned": (YOURS, "bool"),
    "stages": (OURS, "set parallel.pipeline"),
    "partition": (OURS, "blocks are spread evenly over the stages; leave it out"),
    "seed_layers": (OURS, "initialization does not depend on the layout; leave it out"),
    "activation_checkpoint_interval": (OURS, "set parallel.activation_checkpointing"),
}

COMMS_LOGGER_KEYS: dict[str, tuple[str, str]] = {
    "enabled": (YOURS, "bool"),
    "prof_all": (YOURS, "bool"),
    "prof_ops": (YOURS, "list"),
    "verbose": (YOURS, "bool"),
    "debug": (YOURS, "bool"),
}

# Where in the file each table applies.
TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "": TOP_LEVEL_KEYS,
    "zero_optimization": ZERO_KEYS,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER_KEYS,
    "zero_optimization.offload_param": OFFLOAD_PARAM_KEYS,
    "pipeline": PIPELINE_KEYS,
    "comms_logger": COMMS_LOGGER_KEYS,
}


def _wrong_value(kind: str, value: Any) -> str | None:
    """Returns what is wrong with a value of one of the table's kinds, or None."""
    if value == "auto":
        return "'auto' is for Hugging Face's trainer; give the value or leave the key out"
    if kind == "bool":
        return None if isinstance(value, bool) else "must be true or false"
    if kind.endswith("count"):
        least = 1 if kind == "positive count" else 0
        # DeepSpeed's own examples write 5e8, which JSON reads as a fraction.
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        return None if is_whole and value >= least else f"must be a whole number >= {least}"
    if kind == "mapping":
        return None if isinstance(value, dict) else "must be a mapping (in JSON: { ... })"
    if kind == "list":
        return None if isinstance(value, list) else "must be a list (in JSON: [ ... ])"
    choices = kind.split("|")
    wanted_type = int if choices[0] == "0" else str
    if type(value) is not wanted_type or str(value) not in choices:
        return f"must be one of {', '.join(choices)}"
    return None


def _check_key(key: str, value: Any, table: dict[str, tuple[str, str]]) -> str | None:
    """Returns what is wrong with one key of the file, or None."""
    if key not in table:
        return "unknown to DeepSpeed" + nearest(key, table)
    owner, note = table[key]
    if owner == OURS:
        return f"does not belong among DeepSpeed's keys: {note}"
    if owner == REFUSED:
        return f"cannot be used: {note}"
    return _wrong_value(note, value)


def check_deepspeed_keys(values: dict[str, Any]) -> list[Problem]:
    """Checks owner, spelling and kind of every key of a --ds-config mapping.

    Args:
        values: The content of the file.

    Returns:
        The problems, with fields under "deepspeed.".
    """
    found = []
    for path, table in TABLES.items():
        section: Any = values
        for part in filter(None, path.split(".")):
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        for key, value in section.items():
            wrong = _check_key(key, value, table)
            if wrong is not None:
                found.append(Problem(".".join(filter(None, ("deepspeed", path, key))), value, wrong))
    return found
