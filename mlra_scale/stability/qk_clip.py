"""QK-clip: heads whose attention logits grow beyond a threshold get smaller query and key weights.

Kimi Team 2025, 'Kimi K2', arXiv 2507.20534, sec. 2.1 (MuonClip): after an update, with S the largest logit
q_i k_j / sqrt(H) of a head over the batch and tau the threshold (100 there), gamma = min(1, tau / S), the head's query
and key weights are each multiplied by sqrt(gamma). For plain multi-head attention that is all; what the paper adds for
rotary parts of latent attention does not arise here. It is not tied to an optimizer.

Biases are multiplied along with weights, so that every logit of the head is multiplied by gamma exactly. In a
factorised projection (MLRA) only the up-factor, whose rows belong to heads, is clipped, and not the down-factor, which
all heads share.

One difference: the paper takes S from the pass that the gradient came from; here a pass of its own after the update
takes it from the weights that are then clipped. All heads are clipped at once, so later blocks see the smaller logits
of earlier ones only the next time.

Shape suffixes: L blocks, N heads (of the whole model), S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mlra_scale.model.probe import Heads, observe
from mlra_scale.stability.activations import micro_batches_for, number_below
from mlra_scale.stability.watcher import Step, Watcher

if TYPE_CHECKING:
    from mlra_scale.config import BatchPlan, ModelConfig, QkClipConfig
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel import Engine, MicroBatch, StepResult


class QkClip(Watcher):
    """Clips in any layout; the result depends on the layout only by the rounding of the logits."""

    name, is_timed = "qk_clip", True

    def __init__(self, engine: Engine, model: ModelConfig, config: QkClipConfig, plan: BatchPlan) -> None:
        self._engine = engine
        self._model = model
        self._threshold, self._every = config.threshold, config.every
        self._samples = plan.global_batch_size if config.samples is None else config.samples
        self._num_micro_batches = micro_batches_for(self._samples, plan)

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        if self._threshold is None or not result.applied or step.number % self._every != 0:
            return {}
        return {"qk_clip": self.apply(step.batches, step.first_sample)}

    def apply(self, batches: Sequence[MicroBatch], first_sample: int) -> dict[str, Any]:
        """Clips all heads above the threshold and returns the entry `qk_clip` of the record; collective.

        Args:
            batches: This data rank's micro-batches of the step.
            first_sample: Global index of the first sample of the step.
        """
        assert self._threshold is not None
        largest_LN = self._largest_logits(batches[: self._num_micro_batches], first_sample + self._samples)
        factor_LN = clip_factors(largest_LN, self._threshold)
        num_clipped = int((factor_LN != 1.0).sum())
        if num_clipped:
            self._engine.scale_rows(row_factors(factor_LN, self._model, self._engine.table))
        return {"largest_logit": largest_LN.max().item(), "clipped_heads": num_clipped}

    def _largest_logits(self, batches: Sequence[MicroBatch], end: int) -> torch.Tensor:
        """Returns the largest logit of each head over the samples below `end`, on the host; collective."""
        topology = self._engine.topology
        shape = (self._model.num_layers, self._model.num_heads)
        largest_LN = torch.full(shape, -math.inf, dtype=torch.float32, device=topology.device)
        first_here = topology.tensor_rank * self._model.num_heads // topology.tensor
        counted = [number_below(batch, end) for batch in batches]

        def see_heads(index: int, heads: Heads) -> None:
            for piece in heads.logits(counted[index]):
                first = first_here + piece.first_head
                found = largest_LN[heads.block, first : first + len(piece.logits_NSS)]
                found.copy_(torch.maximum(found, piece.logits_NSS.amax(dim=(1, 2))))
                del piece  # before the next one is made

        with observe(self._engine.module, see_heads):
            self._engine.eval_batch(batches)
        dist.all_reduce(largest_LN, op=dist.ReduceOp.MAX)
        return largest_LN.cpu().double()


def clip_factors(largest_LN: torch.Tensor, threshold: float) -> torch.Tensor:
    """Returns the factor on queries and keys of each head: sqrt(min(1, threshold / largest)).

    It is 1 for a head whose logits are not finite: the run is about to stop for that, and a factor would hide it.
    """
    is_above_LN = largest_LN.isfinite() & (largest_LN > threshold)
    return torch.where(is_above_LN, (threshold / largest_LN).sqrt(), torch.ones_like(largest_LN))


def row_factors(factor_LN: torch.Tensor, model: ModelConfig, table: ParameterTable) -> dict[str, torch.Tensor]:
    """Returns a factor for each row of the query and key weights (element, of biases) of blocks with a clipped head."""
    found = {}
    for block, factor_N in enumerate(factor_LN):
        if (factor_N == 1.0).all():
            continue
        for projection in ("q", "k"):
            prefix = f"blocks.{block}.attention.{projection}"
            owner = f"{prefix}.up" if model.is_factorised(projection) else prefix
            for name in (f"{owner}.weight", f"{owner}.bias"):
                found[name] = factor_N.repeat_interleave(table[name].shape[0] // model.num_heads)
    return found
