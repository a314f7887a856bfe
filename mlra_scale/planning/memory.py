"""Memory of one rank by component, from stated formulas. Imports no torch.

The state of training (memory_state.py) is there all the time; activations, logits and temporary results
(memory_activations.py) come and go within a step. The peak is that of the phase of a step that needs most
(`phases_of_a_step`). `train.device=auto` is planned as a GPU.

tests/distributed/test_memory_plan.py compares this with every tensor that ranks on CPUs hold.
Left out: the allocator's fragments, communication buffers of the backends, and the libraries themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlra_scale.config import BatchPlan, Config, offload_optimizer, offload_param
from mlra_scale.planning.layout import Stage
from mlra_scale.planning.memory_activations import (
    activation_bytes,
    backward_bytes,
    dropout_bytes,
    kept_per_block,
    logit_bytes,
    output_bytes,
    recomputed_bytes,
)
from mlra_scale.planning.memory_state import (
    early_gradient_bytes,
    embedding_gradient_bytes,
    flat_gradient_bytes,
    gradient_bytes,
    has_gradients_on_host,
    joined_bytes,
    master_bytes,
    matrix_bytes,
    moment_bytes,
    num_embedding_gradients,
    partitioned_gradient_bytes,
    reduced_bytes,
    reduction_bytes,
    snapshot_bytes,
    update_bytes,
    update_gradient_bytes,
    weight_bytes,
)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    weights: float  # in compute precision
    gradients: float  # kept between micro-batches, with the buffers of their reduction
    master: float  # fp32 copy of the weights
    moments: float  # Adam's two, or the momentum of muon and spectron
    activations: float  # kept for the backward pass, logits not included
    logits: float  # what the head and the loss need at their peak
    temporary: float  # what the phase that needs most adds to what is kept
    host: float  # what offloading put on the host instead (not part of `device`)
    snapshot: float  # the copy of the state that asynchronous checkpoints are written from, on the host as well

    @property
    def device(self) -> float:
        """Sum of the components on the device: the peak."""
        state = self.weights + self.gradients + self.master + self.moments
        return state + self.activations + self.logits + self.temporary


@dataclass(frozen=True)
class PeakPhase:
    """What one phase of a step needs beside weights, master and moments, in bytes; see RankMemory."""

    gradients: float  # without the buffers of the reduction
    buffers: float = 0.0  # those of the reduction, where they are there in this phase
    activations: float = 0.0
    logits: float = 0.0
    temporary: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the five."""
        return self.gradients + self.buffers + self.activations + self.logits + self.temporary


def rank_memory(config: Config, plan: BatchPlan, stage_index: int) -> RankMemory:
    """Estimates the memory of a rank of one pipeline stage; all tensor and data ranks of a stage are alike."""
    stage = Stage(config, plan, stage_index)
    peak = max(phases_of_a_step(stage).values(), key=lambda phase: phase.total)
    state = {
        "weights": weight_bytes(stage),
        "gradients": peak.gradients + peak.buffers,
        "master": master_bytes(stage),
        "moments": moment_bytes(stage),
    }
    on_host = ["master", "moments"] if offload_optimizer(config) else []
    on_host += ["weights"] if offload_param(config) else []
    host = sum(state[name] for name in on_host)
    if has_gradients_on_host(stage):
        host += partitioned_gradient_bytes(stage)
    state |= dict.fromkeys(on_host, 0.0)
    return RankMemory(
        **state,
        activations=peak.activations,
        logits=peak.logits,
        temporary=peak.temporary,
        host=host,
        snapshot=snapshot_bytes(stage),
    )


def phases_of_a_step(stage: Stage) -> dict[str, PeakPhase]:
    """Returns the phases of a step by name, of which one is the peak.

    Whole gradients are there in all of them where a step has more micro-batches than are in flight; else they grow
    while activations go.
    """
    whole, kept_early = gradient_bytes(stage), early_gradient_bytes(stage)
    # With as many micro-batches in flight as there are in all, no backward pass has ended when they are at their most.
    has_ended = stage.plan.accumulation_steps > stage.num_in_flight
    early = whole if has_ended and not stage.adds_up_flat else kept_early
    reduced_at_once = kept_early if stage.adds_up_flat else whole
    kept = activation_bytes(stage)
    at_the_end = kept - (stage.num_blocks - 1) * kept_per_block(stage)
    recomputed = recomputed_bytes(stage)
    output = output_bytes(stage) if stage.is_last else 0.0
    logits = logit_bytes(stage) if stage.is_last else 0.0
    # The head's gradient of the tied embedding waits in autograd until the embedding's is there to be added.
    waiting = embedding_gradient_bytes(stage) if stage.plan.pipeline == 1 else 0.0
    backward = backward_bytes(stage) + waiting
    reduced = reduced_bytes(stage)  # of a bucket, which fills while activations go
    summing = embedding_gradient_bytes(stage) * num_embedding_gradients(stage)
    buffers = reduction_bytes(stage)
    always = buffers if stage.zero == 3 else 0.0
    # A pipeline reduces after its last backward pass, the other engine in each.
    passing, reducing = (0.0, buffers) if stage.is_pipeline else (buffers, always)
    phases = {
        "loss": PeakPhase(early, always, kept, logits),
        "backward of the last block": PeakPhase(early, passing, kept + recomputed, output, backward),
        "backward of the first block": PeakPhase(whole, passing, at_the_end + recomputed, output, backward + reduced),
        "end of the backward pass": PeakPhase(whole, passing, at_the_end, output, summing + reduced),
        "adding up": PeakPhase(whole, always, temporary=joined_bytes(stage)),
        "reduction": PeakPhase(reduced_at_once, reducing, temporary=flat_gradient_bytes(stage)),
        "update": PeakPhase(update_gradient_bytes(stage), always, temporary=update_bytes(stage)),
    }
    if stage.matrices:
        phases["orthogonalisation"] = PeakPhase(update_gradient_bytes(stage), always, temporary=matrix_bytes(stage))
    if stage.model.attention_dropout > 0.0:
        phases["dropout mask"] = PeakPhase(early, always, kept, temporary=dropout_bytes(stage))
    return phases
