"""The mapping that DeepSpeed is given: the user's engine knobs from --ds-config and everything that is derived here."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from mlra_scale.config.deepspeed_keys import check_deepspeed_keys

if TYPE_CHECKING:
    from mlra_scale.config.batch import BatchPlan
    from mlra_scale.config.schema import Config

SEQUENCE_PARALLEL_FORBIDS = ("pipe_partitioned", "grad_partitioned")
"""Keys of DeepSpeed's section `pipeline` that take the stream for the same on all tensor-parallel ranks."""


def zero_stage(config: Config) -> int:
    """Returns the ZeRO stage that runs, 0 to 3.

    It is the one that the DeepSpeed section names, else 0; bf16 has 1 instead of 0. DeepSpeed's optimizer for bf16
    without ZeRO waits for the device once per parameter, starts four times the kernels of ZeRO 1's, and adds
    micro-batches up in bf16.
    """
    zero = config.deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0)) if isinstance(zero, dict) else 0
    return max(stage, 1) if config.train.precision == "bf16" else stage


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
