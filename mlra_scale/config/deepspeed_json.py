"""DeepSpeed's configuration: whose key is whose, and the mapping that deepspeed.initialize gets.

DeepSpeed's JSON mixes engine knobs (ZeRO stage, buckets, offload) with choices that have another owner in this project
(batch sizes, precision, clipping, optimizer). Two owners of one truth drift apart, so a --ds-config file that sets ours
is refused with the field that sets it. `TABLES` is the one table; docs/configuration.md shows it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from mlra_scale.config.problems import Problem, nearest

if TYPE_CHECKING:
    from mlra_scale.config.batch import BatchPlan
    from mlra_scale.config.schema import Config

YOURS = "yours"
OURS = "ours"
REFUSED = "refused"

SEQUENCE_PARALLEL_FORBIDS = ("pipe_partitioned", "grad_partitioned")
"""Keys of DeepSpeed's section `pipeline` that need activations to be equal on all tensor-parallel ranks."""

_OWN_CHECKPOINTS = "checkpoints have their own writer and reader; leave it out"
_NO_EXPERTS = "there are no experts in this model"
_NVME = "state on NVMe is out of reach of TEV and checkpoints; offload to cpu"
_REMOVED = "DeepSpeed has removed it"
_OWN_OPTIMIZER = "it brings an optimizer of its own"
_ULYSSES = (
    "it is DeepSpeed's Ulysses, which splits the sequence over ranks of its own; to split it over the tensor-parallel "
    "ranks, set parallel.sequence_parallel"
)
_DEEP_COMPILE = (
    "it is DeepCompile, which rewrites the graph and is not tested here; for torch.compile set train.compile"
)

# DeepSpeed takes each of these with and without the prefix stage3_; one spelling is enough to read.
_STAGE_3_COUNTS = (
    "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters "
    "max_reuse_distance module_granularity_threshold"
)
_STAGE_3_SWITCHES = "use_all_reduce_for_fetch_params allgather_sequential"


def _with_prefix(names: str) -> str:
    return " ".join(f"stage3_{name}" for name in names.split())


# Section of the file -> owner -> note -> keys. The note is the kind of the value for yours, what sets it for ours, and
# the reason for refused.
_SECTIONS: dict[str, dict[str, dict[str, str]]] = {
    "": {
        YOURS: {
            "mapping": "zero_optimization comms_logger pipeline",
            "fp32|bf16|fp16": "communication_data_type",
            "bool": "memory_breakdown dump_state disable_python_gc",
            "debug|info|warning|error|critical": "log_level",
        },
        OURS: {
            "set train.global_batch_size": "train_batch_size",
            "set train.micro_batch_size": "train_micro_batch_size_per_gpu",
            "follows from train.global_batch_size, train.micro_batch_size and the ranks": (
                "gradient_accumulation_steps managed_gradient_accumulation"
            ),
            "set train.precision": "fp16 bf16 bfloat16 torch_autocast",
            "follows from train.precision: gradients accumulate in fp32 where DeepSpeed can": "data_types",
            "set optim.grad_clip": "gradient_clipping",
            "set optim.name, optim.lr, optim.weight_decay and the other fields of optim": "optimizer",
            "set optim.schedule, optim.warmup_steps and optim.decay_steps": "scheduler",
            "the optimizer is built here; leave it out": "zero_allow_untested_optimizer",
            "follows from zero_optimization.offload_optimizer; leave it out": "zero_force_ds_cpu_optimizer",
            "gradients are those of the mean loss; leave it out": (
                "gradient_allreduce_op prescale_gradients gradient_predivide_factor"
            ),
            "set parallel.activation_checkpointing": "activation_checkpointing",
            "set parallel.tensor": "tensor_parallel",
            "set model.vocab_size": "vocabulary_size",
            "set train.log_every": "steps_per_print",
            "set profile.start and profile.stop": "wall_clock_breakdown flops_profiler",
            "metrics go to metrics.jsonl; leave it out": "csv_monitor comet",
            "set wandb.mode and wandb.project": "wandb",
            "set tensorboard.enabled": "tensorboard",
            "set checkpoint.every and checkpoint.keep_last": "checkpoint",
            _OWN_CHECKPOINTS: "datastates",
            "it waits for the device at every step; tokens per second are logged without it": "timers",
            "batches come from the data section; leave it out": "dataloader_drop_last data_efficiency",
        },
        REFUSED: {
            _ULYSSES: "sequence_parallel_size seq_parallel_communication_data_type",
            "it follows from the number of ranks, parallel.tensor and parallel.pipeline": "data_parallel_size",
            _NO_EXPERTS: "expert_parallel use_data_before_expert_parallelism",
            _NVME: "aio",
            _DEEP_COMPILE: "compile",
            "it starts runs of its own; mlra-scale plan chooses a layout": "autotuning",
            "it is for generation inside training": "hybrid_engine",
            "it is for inference": "weight_quantization",
            "without it ranks would keep different weights": "disable_allgather",
            f"{_REMOVED}; set train.precision": "amp",
            f"{_REMOVED}; set train.global_batch_size": "elasticity",
            _REMOVED: (
                "sparse_gradients sparse_attention compression_training quantize_training curriculum_learning "
                "progressive_layer_drop eigenvalue graph_harvesting nebula"
            ),
        },
    },
    "zero_optimization": {
        YOURS: {
            "0|1|2|3": "stage",
            "mapping": "offload_optimizer offload_param",
            "positive count": "reduce_bucket_size",
            "count": f"allgather_bucket_size sub_group_size {_with_prefix(_STAGE_3_COUNTS)}",
            "bool": (
                "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
                "parameter_alignment ignore_unused_parameters memory_efficient_linear override_module_apply "
                f"log_trace_cache_warnings enable_sanity_checks {_with_prefix(_STAGE_3_SWITCHES)}"
            ),
        },
        OURS: {
            "the gradient norm is logged and guards every update; leave it out": "compute_grad_norm",
            _OWN_CHECKPOINTS: (
                "load_from_fp32_weights gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save "
                "stage3_gather_fp16_weights_on_model_save elastic_checkpoint pipeline_loading_checkpoint"
            ),
        },
        REFUSED: {
            "write it with the prefix stage3_": f"{_STAGE_3_COUNTS} {_STAGE_3_SWITCHES}",
            "it reorders the flat partitions, so that TEV and checkpoints would misplace weights": (
                "round_robin_gradients"
            ),
            "deprecated by DeepSpeed; write offload_optimizer: {device: cpu}": "cpu_offload",
            "deprecated by DeepSpeed; write offload_param: {device: cpu}": "cpu_offload_param",
            "deprecated by DeepSpeed; write offload_optimizer: {pin_memory: true}": "cpu_offload_use_pin_memory",
            "DeepSpeed does not read it any more; leave it out": "legacy_stage1",
            "its groups cut the whole world and know nothing of tensor parallelism": "zero_hpz_partition_size",
            "quantized weights break the equality of layouts": "zero_quantized_weights",
            "quantized gradients break the equality of layouts": "zero_quantized_gradients",
            "every weight is trained": "zero_quantized_nontrainable_weights",
            _OWN_OPTIMIZER: "zenflow",
            "Muon here is not DeepSpeed's; set optim.name": "save_muon_momentum_buffer_in_memory",
            _NO_EXPERTS: "leaf_module",
            _REMOVED: "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param",
        },
    },
    "zero_optimization.offload_optimizer": {
        YOURS: {"none|cpu": "device", "bool": "pin_memory"},
        REFUSED: {
            _NVME: "nvme_path buffer_count pipeline_read pipeline_write fast_init",
            "an optimizer state in two places is out of reach of TEV and checkpoints; offload it whole": "ratio",
            _OWN_OPTIMIZER: "super_offload",
            "only super_offload reads it": "cpuadam_cores_perc",
        },
    },
    "zero_optimization.offload_param": {
        YOURS: {"none|cpu": "device", "bool": "pin_memory"},
        REFUSED: {_NVME: "nvme_path buffer_count buffer_size max_in_cpu"},
    },
    "pipeline": {
        YOURS: {"bool": "pipe_partitioned grad_partitioned"},
        OURS: {
            "set parallel.pipeline": "stages",
            "blocks are spread evenly over the stages; leave it out": "partition",
            "initialization does not depend on the layout; leave it out": "seed_layers",
            "set parallel.activation_checkpointing": "activation_checkpoint_interval",
        },
    },
    "comms_logger": {YOURS: {"bool": "enabled prof_all verbose debug", "list": "prof_ops"}},
}

TABLES: dict[str, dict[str, tuple[str, str]]] = {
    section: {
        key: (owner, note) for owner, notes in owners.items() for note, keys in notes.items() for key in keys.split()
    }
    for section, owners in _SECTIONS.items()
}
"""By section and key: the owner, and the note of the key."""


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


def section_at(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Returns the section at a dotted path of a DeepSpeed mapping; {} where there is none, or no mapping."""
    section: Any = values
    for part in filter(None, path.split(".")):
        section = section.get(part) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}


def check_deepspeed_keys(values: dict[str, Any]) -> list[Problem]:
    """Checks owner, spelling and kind of every key of a --ds-config file; fields begin with "deepspeed."."""
    return [
        Problem(".".join(filter(None, ("deepspeed", path, key))), value, wrong)
        for path, table in TABLES.items()
        for key, value in section_at(values, path).items()
        if (wrong := _check_key(key, value, table)) is not None
    ]


def zero_stage(config: Config) -> int:
    """Returns the ZeRO stage that runs, 0 to 3.

    It is the one that the DeepSpeed section names, else 0; bf16 has 1 instead of 0. DeepSpeed's optimizer for bf16
    without ZeRO waits for the device once per parameter, starts four times the kernels of ZeRO 1's, and adds
    micro-batches up in bf16.
    """
    stage = int(section_at(config.deepspeed, "zero_optimization").get("stage", 0))
    return max(stage, 1) if config.train.precision == "bf16" else stage


def offload_optimizer(config: Config) -> bool:
    """Returns whether the optimizer's state and step live on the CPU (the engine then builds DeepSpeed's CPUAdam)."""
    return section_at(config.deepspeed, "zero_optimization.offload_optimizer").get("device", "none") != "none"


def offload_param(config: Config) -> bool:
    """Returns whether parameters live on the CPU between uses (ZeRO stage 3)."""
    return section_at(config.deepspeed, "zero_optimization.offload_param").get("device", "none") != "none"


def deepspeed_config(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """Builds the mapping that deepspeed.initialize takes: the user's engine knobs and everything derived.

    Args:
        config: A validated configuration; it is not changed.
        plan: Its batch arithmetic for the world it runs in.
    """
    assert not check_deepspeed_keys(config.deepspeed), "deepspeed_config needs a validated configuration"
    merged = copy.deepcopy(config.deepspeed)
    precision = config.train.precision
    merged["train_batch_size"] = plan.global_batch_size
    merged["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    merged["gradient_accumulation_steps"] = plan.accumulation_steps
    merged["gradient_clipping"] = config.optim.grad_clip
    if config.parallel.tensor > 1:
        # By default each tensor-parallel rank would send a part of a stage's output, with a description that the host
        # reads: blocking copies in every micro-batch. With sequence parallelism the outputs differ, and must be sent.
        merged["pipeline"] = {**dict.fromkeys(SEQUENCE_PARALLEL_FORBIDS, False), **merged.get("pipeline", {})}
    if precision == "bf16":
        merged["bf16"] = {"enabled": True}
        merged["zero_optimization"] = {**merged.get("zero_optimization", {}), "stage": zero_stage(config)}
        # Micro-batches add up in fp32. fp16 has no such choice, for in a pipeline DeepSpeed 0.19.8 then gets the sum
        # wrong (loss off by 2e-4 instead of 1e-5).
        merged["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        merged["fp16"] = {"enabled": True, "loss_scale": 0}
    if precision != "fp32":
        # DeepSpeed would round gradients to the compute type for the reduction, after adding them up in fp32.
        merged.setdefault("communication_data_type", "fp32")
    # The engine builds torch's AdamW, or DeepSpeed's CPUAdam for offload; DeepSpeed lists only its own as tested.
    merged["zero_allow_untested_optimizer"] = True
    if offload_optimizer(config):
        # A slow torch optimizer on offloaded state is a mistake that DeepSpeed then refuses.
        merged["zero_force_ds_cpu_optimizer"] = True
    # The training loop prints and measures; DeepSpeed's own lines would come from every stage, and its throughput timer
    # waits for the device.
    merged["steps_per_print"] = 2**31 - 1
    merged["wall_clock_breakdown"] = False
    merged["timers"] = {"throughput": {"enabled": False}}
    return merged
