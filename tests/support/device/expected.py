"""What the trace holds the code to, as data: where the host may wait, and how many kernels a block may start.

Numbers are what the code does, rounded up: lower them when it does better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MEMORY_TOLERANCE = 0.02
"""Share by which the traced peak may differ from planning.memory's."""
BYTES_TOLERANCE = 0.01
"""Share by which bytes sent may differ from planning.communication's."""
LAUNCHES_TOLERANCE = 0.15
"""Share by which the kernels of muon and spectron may differ from planning.step_time's."""
ADDED_SHARES = (0.75, 1.02)
"""What the update of matrices adds to the device's memory, as shares of planning.memory_state's: at ZeRO 1 the traced
rank may hold fewer parts of the round's matrices than the mean one."""
MAX_WAITS, MAX_WAITS_ZERO_3, MAX_WAITS_OFFLOAD = 1, 2, 6
"""Waits of the host in one step, all together but for flow control: ZeRO 0 to 2 and pipelines, ZeRO 3, offload."""
MAX_OTHER_BYTES = 1024
"""What a rank may send in one step in all groups of which the planner counts nothing: the packed read and its like."""


@dataclass(frozen=True)
class Wait:
    """A place where the host may wait for the device."""

    kind: str  # as tracing.Trace names it
    site: str  # file and function
    number: int  # how often in a step, at most
    reason: str  # why


_STAGE_3 = "deepspeed/runtime/zero/stage3.py:DeepSpeedZeroOptimizer_Stage3"
_PROPOSE = "mlra_scale/parallel/engine.py:Engine._propose"
_SMALL_WEIGHTS = Wait(
    "cuda.synchronize",
    "deepspeed/runtime/zero/partition_parameters.py:Init._allgather_params_coalesced",
    1,
    "ZeRO 3: DeepSpeed gathers the small weights that it keeps whole, after the weights have changed",
)
WAITS = (
    Wait(
        "tolist",
        _PROPOSE,
        1,
        "the packed read: loss, gradient norm and the wish to stop, on which finite check, guard and stop decide",
    ),
    _SMALL_WEIGHTS,
    Wait(
        "stream.synchronize",
        "mlra_scale/parallel/host_waits.py:DeviceOrdered.wait_on_host",
        1,
        "offload: the host's Adam reads gradients that the device has sent",
    ),
    Wait("copy cpu to cuda", _PROPOSE, 1, "offload: the norm of gradients that lie on the host"),
    Wait(
        "copy cpu to cuda",
        f"{_STAGE_3}._reassign_or_swap_out_partitioned_parameters",
        2,
        "offload: updated weights, once for each of DeepSpeed's groups of sub_group_size weights",
    ),
)
"""Of a step of training."""
FLOW_CONTROL = (
    Wait(
        "event.synchronize",
        "deepspeed/runtime/zero/partitioned_param_coordinator.py:PartitionedParameterCoordinator._fetch_sub_module_impl",
        2,
        "ZeRO 3: before a weight is fetched, in the forward and in the backward pass, the weight fetched three before "
        "it must be there",
    ),
    Wait(
        "event.synchronize",
        f"{_STAGE_3}.__reduce_and_partition_ipg_grads",
        1,
        "ZeRO 3: before a bucket of gradients is reduced, the bucket three before it must be reduced",
    ),
)
"""Where the host waits only if it is more than two fetches, or buckets, ahead of the device, so that memory stays
bounded. `number` is per parameter and micro-batch here. An event of the trace is not over until it is waited for."""


def is_flow_control(kind: str, site: str) -> bool:
    """Whether a wait is one of FLOW_CONTROL."""
    return any((wait.kind, wait.site) == (kind, site) for wait in FLOW_CONTROL)


def is_of_matrices(site: str) -> bool:
    """Whether muon and spectron send something here: matrices, sums of vectors."""
    return site.startswith(("mlra_scale/parallel/matrix_exchange.py", "mlra_scale/parallel/factor_norms.py"))


HOST_RESULTS = {
    f"mul_ {_STAGE_3}.unscale_and_clip_grads": "offload: gradients are clipped where Adam runs",
}
"""What the host computes by itself in a step."""


LAUNCHES: dict[str, float] = {
    "tensor 2 x pipeline 4 x data 4, stage 0": 63,
    "tensor 2 x pipeline 4 x data 4, stage 1": 51,
    "tensor 2 x pipeline 4 x data 4, stage 3": 52,
    "tensor 2 x pipeline 4 x data 4, sequence parallel, stage 0": 78,
    "tensor 2 x pipeline 4 x data 4, sequence parallel, stage 1": 65,
    "tensor 2 x pipeline 4 x data 4, sequence parallel, stage 3": 66,
    "tensor 2 x pipeline 4 x data 4, masked, stage 0": 63,
    "tensor 2 x pipeline 4 x data 4, masked, stage 1": 53,
    "tensor 2 x pipeline 4 x data 4, masked, stage 3": 53,
    "ZeRO 0 x data 8": 53,
    "ZeRO 1 x data 8": 53,
    "ZeRO 2 x data 8": 76,
    "ZeRO 3 x data 8": 107,
    "ZeRO 3, masked": 108,
    "ZeRO 3 x tensor 2 x data 4": 110,
    "ZeRO 3, offload x data 8": 240,
    "one rank, pipeline engine": 55,
    "several head chunks": 53,
    "masked": 53,
    "block checkpointing": 66,
    "selective checkpointing": 60,
    "fp16, ZeRO 2": 78,
    "tensor 2, dropout": 204,
    "tensor 2, options": 71,
    "tensor 2, sigmaReparam": 257,
    "tensor 2, CompleteP": 58,
    "tensor 2, factorised o": 58,
    "tensor 2, dense": 45,
    "tensor 2, plan replicated": 53,
    "tensor 2, plan merged": 55,
    "muon, ZeRO 1 x data 8": 53,
    "muon, ZeRO 3 x data 8": 107,
    "muon, tensor 2": 55,
    "spectron, ZeRO 1 x data 8": 53,
    "spectron, ZeRO 3 x data 8": 107,
    "spectron, tensor 2": 56,
}
"""Kernels per block and micro-batch, by layout."""
PROCESS_GROUPS = {(2, 4, 4): 239, (1, 1, 8): 95, (2, 1, 4): 74, (1, 1, 1): 23}
"""Process groups that a rank has a part in creating, by tensor-parallel, pipeline and data-parallel ranks."""

_MEMBERS = Wait(
    "copy cpu to cuda",
    "mlra_scale/stability/gradients.py:Groups.members",
    2,
    "which run is of which group, once for each of gradients, weights and updates",
)
_STEP = Wait("item", "mlra_scale/parallel/adam.py:AdamState.step", 1, "the number of updates, packed")
_EVALUATION = Wait("item", "mlra_scale/parallel/zero_engine.py:ZeroEngine.eval_batch", 1, "the loss of a pass")
_PIPELINE_PASS = "mlra_scale/parallel/pipeline_engine.py:PipelineEngine.eval_batch"
_EVALUATIONS = (
    _EVALUATION,
    replace(_EVALUATION, site=_PIPELINE_PASS),
    Wait(
        "barrier",
        "deepspeed/runtime/pipe/engine.py:PipelineEngine.eval_batch",
        1,
        "DeepSpeed lets no stage begin a pass before all have ended the one before",
    ),
)
NEW_TOKENS = 3
"""Tokens that the trace generates after each of two prompts."""
_NEW_TOKENS = "mlra_scale/evaluation/generation.py:_new_tokens"
_GENERATION = "transformers/generation/utils.py:GenerationMixin"
MEASURED_WAITS: dict[str, tuple[Wait, ...]] = {
    "noise scale": WAITS,
    "gradient statistics": (
        _MEMBERS,
        Wait(
            "copy cuda to cpu",
            "mlra_scale/stability/spectral.py:AttentionProducts._largest_singular_values",
            4,
            "two vectors of numbers of each of the two products",
        ),
        Wait(
            "copy cpu to cuda",
            "mlra_scale/stability/spectral.py:AttentionProducts._largest_singular_values",
            2,
            "the vector that the iterations of each product begin with",
        ),
    ),
    "update statistics": (
        replace(_MEMBERS, number=1),
        _STEP,
        Wait("tolist", "mlra_scale/stability/gradients.py:GradientStatistics._report", 1, "all results, packed"),
    ),
    "TEV": (
        Wait("copy cpu to cuda", "mlra_scale/stability/tev.py:report", 1, "where pieces of rows lie"),
        Wait(
            "item",
            "mlra_scale/stability/tev.py:_all_gather",
            1,
            "the longest vector of all ranks, which sizes the gather",
        ),
        Wait("copy cuda to cpu", "mlra_scale/stability/tev.py:_all_gather", 1, "what the ranks have sent"),
        Wait("copy cuda to cpu", "mlra_scale/stability/tev.py:measure", 1, "TEV of every token, and column sums"),
    ),
    "QK-clip": (
        *_EVALUATIONS,
        _SMALL_WEIGHTS,
        Wait(
            "copy cuda to cpu",
            "mlra_scale/stability/qk_clip.py:QkClip._largest_logits",
            1,
            "the largest logit of every head",
        ),
        Wait(
            "copy cpu to cuda",
            "mlra_scale/parallel/fragments.py:scale_rows",
            16,
            "factors of a clipped block's rows: weights and biases of q and k",
        ),
    ),
    "activations": (
        *_EVALUATIONS,
        Wait("copy cuda to cpu", "mlra_scale/stability/activations.py:Tally.values", 1, "all results, packed"),
    ),
    "evaluation": _EVALUATIONS,
    "texts": (
        *_EVALUATIONS,
        Wait("tolist", "mlra_scale/training/watch/text_tasks.py:TextTasks.score", 1, "the scores of all windows"),
    ),
    "agreement of a save": (_STEP,),
    "snapshot": (),
    "generation": (
        Wait("copy cpu to cuda", _NEW_TOKENS, 2, "the prompts and their mask"),
        Wait("copy cpu to cuda", f"{_GENERATION}._prepare_special_tokens", 2, "the tokens that end and pad a text"),
        Wait("item", f"{_GENERATION}._prepare_special_tokens", 2, "transformers checks these tokens"),
        Wait("item", f"{_GENERATION}.generate", 2, "transformers checks the prompts"),
        Wait("item", f"{_GENERATION}._get_logits_processor", 1, "transformers checks its options"),
        Wait(
            "copy cpu to cuda",
            "transformers/cache_utils.py:DynamicLayer.lazy_initialization",
            4,
            "empty keys and values, once for each layer",
        ),
        Wait(
            "item",
            "transformers/generation/utils.py:StopCheck.__call__",
            NEW_TOKENS,
            "whether all texts have ended, after every token",
        ),
        Wait("tolist", _NEW_TOKENS, 2, "the new tokens of each text"),
    ),
    "writing": (
        Wait(
            "event.synchronize",
            "mlra_scale/checkpoint/saving.py:_reading",
            1,
            "the writer's thread waits until the copies are complete; training does not",
        ),
    ),
}
"""The same for what is measured and saved, by phase (measured.py)."""
