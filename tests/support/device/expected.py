"""What the trace holds the code to, as data: where the host may wait, and how many kernels a block may start.

Numbers are what the code does, rounded up: lower them when it does better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MEMORY_TOLERANCE = 0.02
"""Share by which the traced peak may differ from planning.memory's."""
BYTES_TOLERANCE = 0.01
"""Share by which bytes sent may differ from planning.communication's."""
MAX_WAITS, MAX_WAITS_ZERO_3 = 3, 8
"""Waits of the host in one step, all together: ZeRO 0 to 2 and pipelines, and ZeRO 3 and offload."""


@dataclass(frozen=True)
class Wait:
    """A place where the host may wait for the device.

    Attributes:
        kind: As tracing.Trace names it.
        site: File and function.
        number: How often in a step, at most.
        reason: Why.
    """

    kind: str
    site: str
    number: int
    reason: str


_STAGE_3 = "deepspeed/runtime/zero/stage3.py:DeepSpeedZeroOptimizer_Stage3"
_PROPOSE = "mlra_scale/parallel/engine.py:EngineBase._propose"
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
HOST_RESULTS = {
    f"mul_ {_STAGE_3}.unscale_and_clip_grads": "offload: gradients are clipped where Adam runs",
}
"""What the host computes by itself in a step."""


LAUNCHES: dict[str, float] = {
    "tensor 2 x pipeline 4 x data 4, stage 0": 66,
    "tensor 2 x pipeline 4 x data 4, stage 1": 54,
    "tensor 2 x pipeline 4 x data 4, stage 3": 55,
    "tensor 2 x pipeline 4 x data 4, sequence parallel, stage 0": 78,
    "tensor 2 x pipeline 4 x data 4, sequence parallel, stage 1": 66,
    "tensor 2 x pipeline 4 x data 4, sequence parallel, stage 3": 68,
    "tensor 2 x pipeline 4 x data 4, masked, stage 0": 66,
    "tensor 2 x pipeline 4 x data 4, masked, stage 1": 54,
    "tensor 2 x pipeline 4 x data 4, masked, stage 3": 58,
    "ZeRO 0 x data 8": 53,
    "ZeRO 1 x data 8": 53,
    "ZeRO 2 x data 8": 76,
    "ZeRO 3 x data 8": 110,
    "ZeRO 3 x tensor 2 x data 4": 109,
    "ZeRO 3, offload x data 8": 90,
    "one rank, pipeline engine": 60,
    "several head chunks": 53,
    "masked": 58,
    "block checkpointing": 75,
    "selective checkpointing": 60,
    "fp16, ZeRO 2": 80,
    "tensor 2, dropout": 207,
    "tensor 2, options": 71,
    "tensor 2, sigmaReparam": 253,
    "tensor 2, factorised o": 66,
    "tensor 2, dense": 54,
    "tensor 2, plan replicated": 66,
    "tensor 2, plan sharded": 68,
    "tensor 2, plan merged": 58,
}
"""Kernels per block and micro-batch, by layout."""

_MEMBERSHIP = Wait(
    "copy cpu to cuda",
    "mlra_scale/stability/gradients.py:Groups.membership",
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
MEASURED_WAITS: dict[str, tuple[Wait, ...]] = {
    "noise scale": WAITS,
    "gradient statistics": (
        _MEMBERSHIP,
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
        replace(_MEMBERSHIP, number=1),
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
        Wait(
            "copy cuda to cpu", "mlra_scale/stability/tev.py:TevHook.measure", 1, "TEV of every token, and column sums"
        ),
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
    "agreement of a save": (_STEP,),
    "snapshot": (
        Wait(
            "copy cpu to cuda",
            "mlra_scale/checkpoint/copies.py:_weights",
            1,
            "at the first save: the numbers by which copies are condensed; the copies themselves are not waited for",
        ),
    ),
    "writing": (
        Wait(
            "event.synchronize",
            "mlra_scale/checkpoint/snapshot.py:Arrival.wait",
            1,
            "the writer's thread waits until the copies are complete; training does not",
        ),
    ),
}
"""The same for what is measured and saved, by phase (measured.py)."""
