"""Causal multi-head self-attention, dense or with low-rank projections (MLRA).

Shape suffixes: B batch, S sequence (query), D hidden, N heads on this rank, H head dimension, R rank. D / TP is N H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.model.context import ModelContext
from mlra_scale.model.document_mask import AttentionMask, allowed_by, attend_blocks
from mlra_scale.model.linear import (
    LowRankInputProjection,
    LowRankOutputProjection,
    column_linear,
    lowered_together,
    row_linear,
)
from mlra_scale.model.randomness import dropout_attention, key_of
from mlra_scale.model.tensor_parallel import (
    copy_to_tensor_parallel,
    enter_tensor_parallel,
    gather_latents,
    gathered_linear,
)

Recorder = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Takes q_BNSH, k_BNSH as they enter their product, and the mask (None: causal); see probe.py."""


class HeadNorm(nn.Module):
    """Layer norm over the width of each head of queries or keys, without bias (QK-norm; arXiv 2302.05442, 2309.14322).

    weight: [H], for all heads; replicated over TP (a rank sees its heads only: the gradient is summed over TP)
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.context = context
        self.weight = nn.Parameter(torch.empty(context.initialize.table[f"{name}.weight"].shape))
        context.initialize(f"{name}.weight")(self.weight)

    def forward(self, heads_BSNH: torch.Tensor) -> torch.Tensor:
        (weight_H,) = copy_to_tensor_parallel(self.context, self.weight)
        return functional.layer_norm(heads_BSNH, weight_H.shape, weight_H, eps=self.context.model.layer_norm_eps)


class SelfAttention(nn.Module):
    """Self-attention of one block; each of q, k, v, o is dense or factorised, as the configuration says.

    q, k, v dense: weight [D, D], sharded over TP: dim 0; bias [D], sharded over TP: dim 0
    q, k, v factorised: see LowRankInputProjection
    o dense: weight [D, D], sharded over TP: dim 1; bias [D], replicated over TP
    o factorised: see LowRankOutputProjection
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
        self.q = _input_projection(context, name, "q")
        self.k = _input_projection(context, name, "k")
        self.v = _input_projection(context, name, "v")
        build_output = LowRankOutputProjection if model.is_factorised("o") else row_linear
        self.o = build_output(context, f"{name}.o")
        self.q_norm = HeadNorm(context, f"{name}.q_norm") if model.qk_norm else None
        self.k_norm = HeadNorm(context, f"{name}.k_norm") if model.qk_norm else None

    def forward(
        self, hidden_BSD: torch.Tensor, mask: AttentionMask | None, sample_ids_B: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the attention's contribution to the residual stream: [B, S, D], as `hidden_BSD` is given.

        That is equal on all TP ranks, or with sequence parallelism of this rank's positions.

        Args:
            hidden_BSD: The hidden state.
            mask: See document_mask.py; None: causal.
            sample_ids_B: Global index of each sample, where attention weights are dropped.
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
        heads_BSD = heads_BNSH.transpose(1, 2).flatten(2)
        output = self.o(heads_BSD)
        return output[0] if isinstance(output, tuple) else output

    def _project(self, hidden_BSD: torch.Tensor) -> list[torch.Tensor]:
        """q, k, v of this rank's heads, [B, N, S, H] each.

        What enters the sharded matrices - the hidden state, the latents, or both - shares one collective each way.
        """
        projections: dict[str, Any] = {"q": self.q, "k": self.k, "v": self.v}
        factorised = {name: p for name, p in projections.items() if isinstance(p, LowRankInputProjection)}
        project = self._gathered if self.context.has_gathered_linear else self._entered
        outputs = project(hidden_BSD, projections, factorised)
        heads = []
        for name, norm in zip("qkv", (self.q_norm, self.k_norm, None), strict=True):
            heads_BSNH = outputs[name].unflatten(-1, (self.num_heads_local, -1))
            if norm is not None:
                heads_BSNH = norm(heads_BSNH)  # in this order of memory, or attention's output would be copied
            heads.append(heads_BSNH.transpose(1, 2))
        return heads

    def _gathered(
        self, hidden_BSD: torch.Tensor, projections: dict[str, Any], factorised: dict[str, LowRankInputProjection]
    ) -> dict[str, torch.Tensor]:
        """q, k, v from this rank's positions, [B, S, D / TP] each, by maps that gather what they take."""
        inputs: list[torch.Tensor] = []
        maps: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}
        if self.context.low_rank_plan == "replicated":
            for name, p in factorised.items():
                maps[name] = (len(inputs), p.up.weight, p.up.bias)
                inputs.append(p.lower(hidden_BSD)[0])
        elif factorised:
            downs = copy_to_tensor_parallel(self.context, *[p.down.weight for p in factorised.values()])
            for (name, p), down_RD in zip(factorised.items(), downs, strict=True):
                maps[name] = (len(inputs), p.up.weight @ down_RD, p.up.bias)
        for name, p in projections.items():
            if name not in factorised:
                maps[name] = (len(inputs), p.weight, p.bias)
        if len(maps) > len(inputs):
            inputs.append(hidden_BSD)
        return dict(zip(maps, gathered_linear(self.context, inputs, list(maps.values())), strict=True))

    def _entered(
        self, hidden_BSD: torch.Tensor, projections: dict[str, Any], factorised: dict[str, LowRankInputProjection]
    ) -> dict[str, torch.Tensor]:
        """q, k, v, [B, S, D / TP] each, of a stream that enters as a whole."""
        outputs = {}
        if self.context.low_rank_plan == "replicated" or not factorised:
            lowered = lowered_together(self.context, hidden_BSD, factorised)
            has_dense = len(factorised) < len(projections)
            replicated = ([hidden_BSD] if has_dense else []) + [latent for latent, _ in lowered.values()]
            entered = enter_tensor_parallel(self.context, *replicated)
            hidden_BSD = entered[0]  # read by dense projections only
            for (name, p), latent in zip(factorised.items(), entered[has_dense:], strict=True):
                outputs[name] = p.rise(latent, lowered[name][1])
        else:
            (hidden_BSD,) = enter_tensor_parallel(self.context, hidden_BSD)
            outputs = self._sharded(hidden_BSD, factorised)
        for name, p in projections.items():
            if name not in factorised:
                outputs[name], _ = p(hidden_BSD)
        return outputs

    def _sharded(
        self, hidden_BSD: torch.Tensor, factorised: dict[str, LowRankInputProjection]
    ) -> dict[str, torch.Tensor]:
        """The factorised projections of a hidden state that has entered sharded computation, [B, S, D / TP] each."""
        if self.context.low_rank_plan == "merged":
            downs = copy_to_tensor_parallel(self.context, *[p.down.weight for p in factorised.values()])
            return {name: p.merged(hidden_BSD, down) for (name, p), down in zip(factorised.items(), downs, strict=True)}
        shares = [p.lower(hidden_BSD)[0] for p in factorised.values()]
        latents = gather_latents(self.context, *shares)
        return {name: p.rise(latent, None) for (name, p), latent in zip(factorised.items(), latents, strict=True)}


def _input_projection(context: ModelContext, name: str, projection: str) -> nn.Module:
    if context.model.is_factorised(projection):
        return LowRankInputProjection(context, f"{name}.{projection}")
    return column_linear(context, f"{name}.{projection}")


def _logits(q_BNSH: torch.Tensor, k_BNSH: torch.Tensor, mask_B1SS: torch.Tensor | None) -> torch.Tensor:
    """Scaled attention logits in fp32, [B, N, S, S], with an additive mask; -inf where attention is not allowed."""
    logits_BNSS = (q_BNSH @ k_BNSH.transpose(-1, -2)).float() / math.sqrt(q_BNSH.size(-1))
    if mask_B1SS is not None:
        return logits_BNSS + mask_B1SS
    size = logits_BNSS.size(-1)
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=logits_BNSS.device).tril()
    return logits_BNSS.masked_fill(~causal_SS, float("-inf"))
