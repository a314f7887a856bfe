"""Causal multi-head self-attention, dense or with low-rank projections (MLRA).

A variant with weights of its own needs a field in config/model_config.py (which also counts its parameters), their
names, shapes and sharding in parameters.py, their initial scale in initialization.py, and its computation here.

Shape suffixes: B batch, S sequence (query), D hidden, N heads on this rank, H head dimension, R rank. D / TP is N H.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.model.context import ModelContext
from mlra_scale.model.document_mask import AttentionMask, allowed_by, attend_blocks
from mlra_scale.model.linear import (
    ColumnLinear,
    LowRankInputProjection,
    LowRankOutputProjection,
    MergedMap,
    RowLinear,
    column_maps,
    down_project,
)
from mlra_scale.model.norm import HeadNorm
from mlra_scale.model.randomness import dropout_attention, key_of
from mlra_scale.model.tensor_parallel import copy_to_tensor_parallel

Recorder = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Receives q_BNSH, k_BNSH as they enter their product, and the mask (None: causal); see probe.py."""


class SelfAttention(nn.Module):
    """Self-attention of one block; each of q, k, v, o is dense or factorised, as the configuration says.

    q, k, v dense: see ColumnLinear; factorised: see LowRankInputProjection
    o dense: see RowLinear; factorised: see LowRankOutputProjection
    q_norm, k_norm, with `model.qk_norm`: see HeadNorm
    """

    def __init__(self, context: ModelContext, name: str, block: int) -> None:
        super().__init__()
        model = context.model
        self.context = context
        self.block = block
        self.num_heads_local = model.num_heads // context.tensor_parallel
        self.first_head = self.num_heads_local * context.tensor_rank
        self.dropout_key = key_of(context.seed, f"{name}/weights")
        self.recorder: Recorder | None = None
        self.q, self.k, self.v = (
            LowRankInputProjection(context, f"{name}.{projection}")
            if model.is_factorised(projection)
            else ColumnLinear(context, f"{name}.{projection}")
            for projection in "qkv"
        )
        self.o = (LowRankOutputProjection if model.is_factorised("o") else RowLinear)(context, f"{name}.o")
        self.q_norm = HeadNorm(context, f"{name}.q_norm") if model.qk_norm else None
        self.k_norm = HeadNorm(context, f"{name}.k_norm") if model.qk_norm else None

    def forward(
        self, hidden_BSD: torch.Tensor, mask: AttentionMask | None, sample_ids_B: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the contribution to the residual stream, [B, S, D], or with sequence parallelism own positions.

        Args:
            hidden_BSD: The hidden state.
            mask: See document_mask.py; None: causal.
            sample_ids_B: Global index of each sample; read where attention weights are dropped.
        """
        q_BNSH, k_BNSH, v_BNSH = self._project(hidden_BSD)
        if self.recorder is not None:
            self.recorder(q_BNSH, k_BNSH, None if mask is None else allowed_by(mask))
        probability = self.context.model.attention_dropout if self.training else 0.0
        if probability > 0.0:
            assert sample_ids_B is not None
            assert mask is None or isinstance(mask, torch.Tensor)
            weights_BNSS = torch.softmax(_logits(q_BNSH, k_BNSH, mask), dim=-1).to(v_BNSH.dtype)
            weights_BNSS = dropout_attention(weights_BNSS, probability, self.dropout_key, sample_ids_B, self.first_head)
            heads_BNSH = weights_BNSS @ v_BNSH
        elif mask is None or isinstance(mask, torch.Tensor):
            heads_BNSH = functional.scaled_dot_product_attention(
                q_BNSH, k_BNSH, v_BNSH, attn_mask=mask, is_causal=mask is None
            )
        else:
            heads_BNSH = attend_blocks(q_BNSH, k_BNSH, v_BNSH, mask)
        return self.o(heads_BNSH.transpose(1, 2).flatten(2))

    def read_parameters(self) -> list[nn.Parameter]:
        """Parameters that `forward` reads without calling the modules that own them."""
        if self.context.model.sigma_reparam:
            return list(self.parameters())  # sigma of a map is that of both factors, where the up factor is used
        if self.context.tensor_parallel == 1:
            return []
        return [parameter for projection in (self.q, self.k, self.v) for parameter in projection.parameters()]

    def _project(self, hidden_BSD: torch.Tensor) -> list[torch.Tensor]:
        """q, k, v of this rank's heads, [B, N, S, H] each.

        What enters the column-parallel maps shares one collective each way: the latents of factorised projections
        (plan `replicated`), and the hidden state where another map needs it. See low_rank_plan.py.
        """
        context = self.context
        projections = {"q": self.q, "k": self.k, "v": self.v}
        factorised = {name: p for name, p in projections.items() if isinstance(p, LowRankInputProjection)}
        inputs: list[torch.Tensor] = []
        maps: dict[str, tuple[int, ColumnLinear | MergedMap]] = {}
        if context.low_rank_plan == "replicated":
            inputs = down_project(context, hidden_BSD, list(factorised.values()))
            maps = {name: (index, p.up) for index, (name, p) in enumerate(factorised.items())}
        elif factorised:
            downs = copy_to_tensor_parallel(context, *[p.down.weight for p in factorised.values()])
            for (name, p), down_RD in zip(factorised.items(), downs, strict=True):
                maps[name] = (0, MergedMap(p.up.weight @ down_RD, p.up.bias))
        maps |= {name: (len(inputs), p) for name, p in projections.items() if isinstance(p, ColumnLinear)}
        if len(maps) > len(inputs):
            inputs.append(hidden_BSD)
        outputs = dict(zip(maps, column_maps(context, inputs, list(maps.values())), strict=True))
        heads = []
        for name, norm in zip("qkv", (self.q_norm, self.k_norm, None), strict=True):
            heads_BSNH = outputs[name].unflatten(-1, (self.num_heads_local, -1))
            if norm is not None:
                heads_BSNH = norm(heads_BSNH)  # in this memory order, or attention's output would be copied
            heads.append(heads_BSNH.transpose(1, 2))
        return heads


def _logits(q_BNSH: torch.Tensor, k_BNSH: torch.Tensor, mask_B1SS: torch.Tensor | None) -> torch.Tensor:
    """Scaled attention logits in fp32, [B, N, S, S], with an additive mask; -inf where attention is not allowed."""
    logits_BNSS = (q_BNSH @ k_BNSH.transpose(-1, -2)).float() / math.sqrt(q_BNSH.size(-1))
    if mask_B1SS is not None:
        return logits_BNSS + mask_B1SS
    size = logits_BNSS.size(-1)
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=logits_BNSS.device).tril()
    return logits_BNSS.masked_fill(~causal_SS, float("-inf"))
