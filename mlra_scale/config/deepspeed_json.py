"""The --ds-config file: which of DeepSpeed's keys belong to whom, and the merge with what is derived here.

DeepSpeed's JSON mixes engine knobs (ZeRO stage, buckets, offload) with choices that have another owner in this project
(batch sizes, precision, clipping, optimizer). Two owners of one truth drift apart, so a file that sets ours is refused,
with the place where to set it. `TOP_LEVEL_KEYS` and `ZERO_KEYS` are the one table; docs/configuration.md shows it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from mlra_scale.config.problems import Problem, nearest

if TYPE_CHECKING:
    from mlra_scale.config.schema import Config
    from mlra_scale.config.validation import BatchPlan

YOURS = "yours"
OURS = "ours"
REFUSED = "refused"

# key -> (owner, kind of value for yours / where to set it for ours / why not for refused)
TOP_LEVEL_KEYS: dict[str, tuple[str, str]] = {
    "zero_optimization": (YOURS, "mapping"),
    "communication_data_type": (YOURS, "fp32|bf16|fp16"),
    "prescale_gradients": (YOURS, "bool"),
    "gradient_predivide_factor": (YOURS, "number"),
    "comms_logger": (YOURS, "mapping"),
    "pipeline": (YOURS, "mapping"),
    "aio": (YOURS, "mapping"),
    "timers": (YOURS, "mapping"),
    "memory_breakdown": (YOURS, "bool"),
    "dump_state": (YOURS, "bool"),
    "disable_python_gc": (YOURS, "bool"),
    "log_level": (YOURS, "text"),
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
    "gradient_allreduce_op": (OURS, "gradients are those of the mean loss; leave it out"),
    "activation_checkpointing": (OURS, "set parallel.activation_checkpointing"),
    "tensor_parallel": (OURS, "set parallel.tensor"),
    "vocabulary_size": (OURS, "set model.vocab_size"),
    "steps_per_print": (OURS, "set train.log_every"),
    "wall_clock_breakdown": (OURS, "set profile.start and profile.stop"),
    "flops_profiler": (OURS, "set profile.start and profile.stop"),
    "tensorboard": (OURS, "metrics go to metrics.jsonl and, by the wandb section, to Weights & Biases"),
    "wandb": (OURS, "set wandb.mode and wandb.project"),
    "csv_monitor": (OURS, "metrics go to metrics.jsonl"),
    "comet": (OURS, "metrics go to metrics.jsonl"),
    "checkpoint": (OURS, "set checkpoint.every and checkpoint.keep_last"),
    "dataloader_drop_last": (OURS, "batches come from the data section; leave it out"),
    "data_efficiency": (OURS, "batches come from the data section; leave it out"),
    "sequence_parallel_size": (REFUSED, "sequence parallelism is not part of this trainer"),
    "data_parallel_size": (REFUSED, "it follows from the number of ranks, parallel.tensor and parallel.pipeline"),
    "seq_parallel_communication_data_type": (REFUSED, "sequence parallelism is not part of this trainer"),
    "expert_parallel": (REFUSED, "there are no experts in this model"),
    "use_data_before_expert_parallelism": (REFUSED, "there are no experts in this model"),
    "compile": (REFUSED, "DeepCompile changes the graph that parity tests prove equal"),
    "autotuning": (REFUSED, "it starts runs of its own; use --dry-run to choose a layout"),
    "hybrid_engine": (REFUSED, "it is for generation inside training"),
    "weight_quantization": (REFUSED, "it is for inference"),
    "datastates": (REFUSED, "checkpoints have their own writer"),
    "disable_allgather": (REFUSED, "without it ranks would keep different weights"),
    "amp": (REFUSED, "DeepSpeed has removed it; set train.precision"),
    "elasticity": (REFUSED, "DeepSpeed has removed it; set train.global_batch_size"),
    "sparse_gradients": (REFUSED, "DeepSpeed has removed it"),
    "sparse_attention": (REFUSED, "DeepSpeed has removed it"),
    "compression_training": (REFUSED, "DeepSpeed has removed it"),
    "quantize_training": (REFUSED, "DeepSpeed has removed it"),
    "curriculum_learning": (REFUSED, "DeepSpeed has removed it"),
    "progressive_layer_drop": (REFUSED, "DeepSpeed has removed it"),
    "eigenvalue": (REFUSED, "DeepSpeed has removed it"),
    "graph_harvesting": (REFUSED, "DeepSpeed has removed it"),
    "nebula": (REFUSED, "DeepSpeed has removed it"),
}

_GATHER_ON_SAVE = "checkpoints here hold every rank's own elements and are the source of exports; leave it out"

ZERO_KEYS: dict[str, tuple[str, str]] = {
    "stage": (YOURS, "0|1|2|3"),
    "contiguous_gradients": (YOURS, "bool"),
    "reduce_scatter": (YOURS, "bool"),
    "reduce_bucket_size": (YOURS, "count"),
    "use_multi_rank_bucket_allreduce": (YOURS, "bool"),
    "allgather_partitions": (YOURS, "bool"),
    "allgather_bucket_size": (YOURS, "count"),
    "overlap_comm": (YOURS, "bool"),
    "round_robin_gradients": (YOURS, "bool"),
    "parameter_alignment": (YOURS, "bool"),
    "ignore_unused_parameters": (YOURS, "bool"),
    "offload_optimizer": (YOURS, "mapping"),
    "offload_param": (YOURS, "mapping"),
    "sub_group_size": (YOURS, "count"),
    "prefetch_bucket_size": (YOURS, "count"),
    "param_persistence_threshold": (YOURS, "count"),
    "model_persistence_threshold": (YOURS, "count"),
    "max_live_parameters": (YOURS, "count"),
    "max_reuse_distance": (YOURS, "count"),
    "stage3_prefetch_bucket_size": (YOURS, "count"),
    "stage3_param_persistence_threshold": (YOURS, "count"),
    "stage3_model_persistence_threshold": (YOURS, "count"),
    "stage3_max_live_parameters": (YOURS, "count"),
    "stage3_max_reuse_distance": (YOURS, "count"),
    "stage3_module_granularity_threshold": (YOURS, "count"),
    "stage3_use_all_reduce_for_fetch_params": (YOURS, "bool"),
    "stage3_allgather_sequential": (YOURS, "bool"),
    "zero_hpz_partition_size": (YOURS, "count"),
    "zero_quantized_weights": (YOURS, "bool"),
    "zero_quantized_gradients": (YOURS, "bool"),
    "memory_efficient_linear": (YOURS, "bool"),
    "override_module_apply": (YOURS, "bool"),
    "log_trace_cache_warnings": (YOURS, "bool"),
    "enable_sanity_checks": (YOURS, "bool"),
    "compute_grad_norm": (OURS, "the gradient norm is logged and guards every update; leave it out"),
    "load_from_fp32_weights": (OURS, "checkpoints hold fp32 masters and load them; leave it out"),
    "gather_16bit_weights_on_model_save": (OURS, _GATHER_ON_SAVE),
    "stage3_gather_16bit_weights_on_model_save": (OURS, _GATHER_ON_SAVE),
    "stage3_gather_fp16_weights_on_model_save": (OURS, _GATHER_ON_SAVE),
    "cpu_offload": (REFUSED, "deprecated by DeepSpeed; write offload_optimizer: {device: cpu}"),
    "cpu_offload_param": (REFUSED, "deprecated by DeepSpeed; write offload_param: {device: cpu}"),
    "cpu_offload_use_pin_memory": (REFUSED, "deprecated by DeepSpeed; write offload_optimizer: {pin_memory: true}"),
    "elastic_checkpoint": (REFUSED, "checkpoints here re-shard by themselves"),
    "legacy_stage1": (REFUSED, "DeepSpeed has removed it"),
    "pipeline_loading_checkpoint": (REFUSED, "checkpoints have their own reader"),
    "zenflow": (REFUSED, "it brings an optimizer of its own"),
    "zero_quantized_nontrainable_weights": (REFUSED, "every weight is trained"),
    "save_muon_momentum_buffer_in_memory": (REFUSED, "the optimizer is AdamW"),
    "leaf_module": (REFUSED, "there are no experts in this model"),
    "mics_shard_size": (REFUSED, "DeepSpeed has removed it"),
    "mics_hierarchical_params_gather": (REFUSED, "DeepSpeed has removed it"),
    "zeropp_loco_param": (REFUSED, "DeepSpeed has removed it"),
}

OFFLOAD_KEYS: dict[str, tuple[str, str]] = {
    "device": (YOURS, "none|cpu"),
    "pin_memory": (YOURS, "bool"),
    "buffer_count": (YOURS, "count"),
    "buffer_size": (YOURS, "count"),
    "max_in_cpu": (YOURS, "count"),
    "pipeline_read": (YOURS, "bool"),
    "pipeline_write": (YOURS, "bool"),
    "fast_init": (YOURS, "bool"),
    "nvme_path": (REFUSED, "state on NVMe is out of reach of TEV and checkpoints; offload to cpu"),
    "ratio": (REFUSED, "a split optimizer state is out of reach of TEV and checkpoints; offload it whole"),
    "super_offload": (REFUSED, "it brings an optimizer of its own"),
    "cpuadam_cores_perc": (REFUSED, "it is read only by super_offload"),
}

PIPELINE_KEYS: dict[str, tuple[str, str]] = {
    "pipe_partitioned": (YOURS, "bool"),
    "grad_partitioned": (YOURS, "bool"),
    "stages": (OURS, "set parallel.pipeline"),
    "partition": (OURS, "blocks are spread evenly over the stages; leave it out"),
    "seed_layers": (OURS, "initialization does not depend on the layout; leave it out"),
    "activation_checkpoint_interval": (OURS, "set parallel.activation_checkpointing"),
}

_OFFLOAD_DEVICE_ONLY = {"optimizer": {"buffer_size", "max_in_cpu"}, "param": {"pipeline_read", "pipeline_write"}}


def _wrong_value(kind: str, value: Any) -> str | None:
    """Returns what is wrong with a value of one of the table's kinds, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "bool":
        return None if isinstance(value, bool) else "must be true or false"
    if kind == "count":
        # DeepSpeed's own examples write 5e8, which JSON reads as a fraction.
        return None if is_number and value >= 0 and value == int(value) else "must be a whole number >= 0"
    if kind == "number":
        return None if is_number and value > 0 else "must be a number > 0"
    if kind == "mapping":
        return None if isinstance(value, dict) else "must be a mapping (in JSON: {...})"
    if kind == "text":
        return None if isinstance(value, str) else "must be text"
    choices = kind.split("|")
    if isinstance(value, bool) or str(value) not in choices or (choices[0] == "0") != is_number:
        return f"must be one of {', '.join(choices)}"
    return None


def _check_keys(values: dict[str, Any], table: dict[str, tuple[str, str]], path: str) -> list[Problem]:
    found = []
    for key, value in values.items():
        field = f"{path}.{key}"
        if key not in table:
            found.append(Problem(field, value, "unknown to DeepSpeed 0.19" + nearest(key, table)))
            continue
        owner, note = table[key]
        if owner == OURS:
            found.append(Problem(field, value, f"not a key of this file: {note}"))
        elif owner == REFUSED:
            found.append(Problem(field, value, f"cannot be used: {note}"))
        elif value == "auto":
            found.append(Problem(field, value, "'auto' is for Hugging Face's trainer; give the value or leave the key out"))
        elif (wrong := _wrong_value(note, value)) is not None:
            found.append(Problem(field, value, wrong))
    return found


def check_deepspeed_keys(values: dict[str, Any]) -> list[Problem]:
    """Checks owner, spelling and kind of every key of a --ds-config mapping.

    Args:
        values: The content of the file.

    Returns:
        The problems, with fields under "deepspeed.".
    """
    found = _check_keys(values, TOP_LEVEL_KEYS, "deepspeed")
    zero = values.get("zero_optimization")
    if isinstance(zero, dict):
        found += _check_keys(zero, ZERO_KEYS, "deepspeed.zero_optimization")
        for name in ("offload_optimizer", "offload_param"):
            if isinstance(zero.get(name), dict):
                found += _check_keys(zero[name], OFFLOAD_KEYS, f"deepspeed.zero_optimization.{name}")
    if isinstance(values.get("pipeline"), dict):
        found += _check_keys(values["pipeline"], PIPELINE_KEYS, "deepspeed.pipeline")
    return found


def zero_stage(config: Config) -> int:
    """Returns the ZeRO stage, 0 to 3; 0 when the DeepSpeed section does not name one."""
    zero = config.deepspeed.get("zero_optimization", {})
    return int(zero.get("stage", 0)) if isinstance(zero, dict) else 0


def _offload_device(config: Config, name: str) -> str:
    zero = config.deepspeed.get("zero_optimization", {})
    section = zero.get(name, {}) if isinstance(zero, dict) else {}
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def offload_optimizer(config: Config) -> bool:
    """Returns whether the optimizer's state and step live on the CPU (the engine then builds DeepSpeed's CPUAdam)."""
    return _offload_device(config, "offload_optimizer") != "none"


def offload_param(config: Config) -> bool:
    """Returns whether parameters live on the CPU between uses (ZeRO stage 3)."""
    return _offload_device(config, "offload_param") != "none"


def deepspeed_config(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """Builds the mapping that deepspeed.initialize takes: the user's engine knobs and everything derived.

    Args:
        config: A validated configuration.
        plan: Its batch arithmetic for the world it runs in.

    Returns:
        A new mapping; the configuration is not changed.
    """
    assert not check_deepspeed_keys(config.deepspeed), "deepspeed_config needs a validated configuration"
    merged = copy.deepcopy(config.deepspeed)
    precision = config.train.precision
    merged["train_batch_size"] = plan.global_batch_size
    merged["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    merged["gradient_accumulation_steps"] = plan.accumulation_steps
    merged["gradient_clipping"] = config.optim.grad_clip
    if precision == "bf16":
        merged["bf16"] = {"enabled": True}
        if zero_stage(config) > 0:
            # Micro-batches add up in fp32. Stage 0 has no such choice: DeepSpeed refuses the mix there.
            merged["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        merged["fp16"] = {"enabled": True, "loss_scale": 0}
    if offload_optimizer(config):
        merged["zero_force_ds_cpu_optimizer"] = True
    # Our optimizer is torch's AdamW over named groups; DeepSpeed lists only its own as tested.
    merged["zero_allow_untested_optimizer"] = True
    # The training loop prints; DeepSpeed's own lines would come from every stage.
    merged["steps_per_print"] = 2**31 - 1
    merged["wall_clock_breakdown"] = False
    return merged
