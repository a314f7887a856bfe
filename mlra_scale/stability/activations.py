"""Activations on a fixed probe batch: residual stream, attention entropy, logits, saturation.

Measured for every block in a forward pass without dropout, always over the same samples:

- residual variance: the population variance (ddof 0) of a token's hidden state over its D coordinates, which is what
  the next LayerNorm divides by; mean over all tokens. At L + 1 points: where the residual stream enters block 0, and
  where it leaves each block.
- attention entropy: -sum_j a_ij log a_ij in nats; mean over all queries and heads (Zhai et al. 2023, arXiv 2303.06296).
  A query that may attend to one key only, such as the first of a sample, has entropy 0 and counts.
- largest logit: the largest q_i k_j / sqrt(H) over all allowed pairs, and heads.
- saturated share: the share of queries and heads whose largest weight exceeds a bound. Queries that may attend to one
  key only are left out of both numbers, because their weight is 1 by construction; 0 where there are no others.

Shape suffixes: L blocks, K ranks that hold other heads or samples of the same block (data times tensor ranks), P points
of the residual stream (L + 1), B batch, S sequence, D hidden, N heads on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from mlra_scale.model.probe import Heads, observe

if TYPE_CHECKING:
    from mlra_scale.config import ActivationsConfig, BatchPlan, ModelConfig
    from mlra_scale.parallel import Engine, MicroBatch


class Tally:
    """Sums and maxima of one measurement in one vector, which one sum over all ranks completes.

    A sum cannot find a maximum, so each of the K ranks that hold heads of a block has an element of its own for theirs.

    Attributes:
        packed: All of the following, float64.
        tokens_1: Tokens counted.
        residual_P: Sum over tokens of the variance of the hidden state.
        entropy_L: Sum over queries and heads of the attention entropy.
        saturated_L: Number of saturated rows of attention weights.
        open_L: Number of rows with more than one allowed key.
        largest_KL: Largest logit of each rank.
    """

    def __init__(self, num_layers: int, num_ranks: int = 1, rank: int = 0, device: torch.device | None = None) -> None:
        self._sizes = [1, num_layers + 1, num_layers, num_layers, num_layers, num_ranks * num_layers]
        self.packed = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        parts = self.packed.split(self._sizes)
        self.tokens_1, self.residual_P, self.entropy_L, self.saturated_L, self.open_L, largest = parts
        self.largest_KL = largest.view(num_ranks, num_layers)
        self.rank = rank

    def add_hidden(self, point: int, hidden_BSD: torch.Tensor) -> None:
        """Adds the hidden state of some tokens at one point of the residual stream."""
        if point == 0:
            self.tokens_1 += hidden_BSD.numel() // hidden_BSD.size(-1)
        self.residual_P[point] += hidden_BSD.float().var(dim=-1, correction=0).sum(dtype=torch.float64)

    def begin(self, block: int) -> None:
        """Notes that this rank holds heads of a block."""
        self.largest_KL[self.rank, block].fill_(-math.inf)  # an assignment would copy from the host, and wait

    def add_heads(self, heads: Heads, num_samples: int, saturation: float) -> None:
        """Adds the attention of one block on the first samples of a micro-batch."""
        block = heads.block
        for piece in heads.logits(num_samples):
            weights_NSS = piece.logits_NSS.softmax(dim=-1)
            is_open_S = piece.allowed_SS.sum(dim=-1) > 1
            is_saturated_NS = (weights_NSS.amax(dim=-1) > saturation) & is_open_S
            # entr(p) is -p log p, and 0 where p is 0.
            self.entropy_L[block] += torch.special.entr(weights_NSS).sum(dtype=torch.float64)
            self.saturated_L[block] += is_saturated_NS.sum()
            self.open_L[block] += is_open_S.sum() * len(weights_NSS)
            largest = self.largest_KL[self.rank, block]
            largest.copy_(torch.maximum(largest, piece.logits_NSS.amax()))

    def values(self, num_heads: int) -> dict[str, Any]:
        """Returns the entry of the record; `num_heads` are those of a block, over all tensor-parallel ranks."""
        parts = self.packed.cpu().split(self._sizes)  # one read of the device
        tokens, residual_P, entropy_L, saturated_L, open_L, largest = (part.numpy() for part in parts)
        assert tokens[0] > 0
        variance_P = residual_P / tokens
        entropy_L = entropy_L / (tokens * num_heads)
        share_L = saturated_L / np.maximum(open_L, 1)
        largest_L = largest.reshape(self.largest_KL.shape).max(axis=0)
        return {
            "residual_variance": variance_P.tolist(),
            "attention_entropy": entropy_L.tolist(),
            "largest_logit": largest_L.tolist(),
            "saturated_share": share_L.tolist(),
            "max_residual_variance": float(variance_P.max()),
            "min_attention_entropy": float(entropy_L.min()),
            "max_logit": float(largest_L.max()),
            "max_saturated_share": float(share_L.max()),
        }


class ActivationProbe:
    """Measures activations in any layout; the result depends on the layout only by rounding."""

    def __init__(self, engine: Engine, model: ModelConfig, config: ActivationsConfig, plan: BatchPlan) -> None:
        self._engine = engine
        self._model = model
        self._config = config
        self.num_micro_batches = micro_batches_for(config.samples, plan)
        """Micro-batches that each data rank needs, laid out as those of a training step."""

    def measure(self, batches: Sequence[MicroBatch], between: Callable[[], None] | None = None) -> dict[str, Any]:
        """Measures on the samples number 0 ... samples - 1; collective.

        Args:
            batches: This data rank's micro-batches of the probe batch. Further samples in them do not count.
            between: See Engine.eval_batch.

        Returns:
            The entry `activations` of the record: lists over points or blocks, and the extremes of each.
        """
        topology, saturation = self._engine.topology, self._config.saturation
        num_ranks, rank = topology.data * topology.tensor, topology.data_rank * topology.tensor + topology.tensor_rank
        tally = Tally(self._model.num_layers, num_ranks, rank, topology.device)
        counted = [number_below(batch, self._config.samples) for batch in batches]

        def see_heads(index: int, heads: Heads) -> None:
            if index == 0:
                tally.begin(heads.block)
            tally.add_heads(heads, counted[index], saturation)

        def see_hidden(index: int, point: int, hidden_BSD: torch.Tensor) -> None:
            if topology.tensor_rank == 0 and counted[index] > 0:  # torch warns of the variance of nothing
                tally.add_hidden(point, hidden_BSD[: counted[index]])

        with observe(self._engine.module, see_heads, see_hidden):
            self._engine.eval_batch(batches, between)
        dist.all_reduce(tally.packed)
        return tally.values(self._model.num_heads)


def micro_batches_for(num_samples: int, plan: BatchPlan) -> int:
    """Returns how many micro-batches of every data rank hold the first samples of a batch."""
    return math.ceil(num_samples / (plan.micro_batch_size * plan.data))


def number_below(batch: MicroBatch, end: int) -> int:
    """Returns how many samples of a micro-batch, which are consecutive, have an index below `end`."""
    return int((batch.sample_ids_B < end).sum())
