"""Low-rank attention projections in a GPT-2 of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from mlra_scale.shipped.low_rank_linear import INITIALIZATIONS, LowRankLinear


class JoinedProjections(nn.Module):
    """q, k and v, side by side as GPT-2's c_attn gives them; each dense or low-rank.

    q, k, v: weight [D, D], bias [D], or where factorised down.weight [R, D], up.weight [D, R], up.bias [D]
    """

    def __init__(self, q: nn.Module, k: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def replace_attention_projections(
    model: PreTrainedModel,
    rank: int,
    projections: Sequence[str] = ("q", "k", "v"),
    init: Literal["svd", "gpt2", "xavier", "matched"] = "svd",
) -> None:
    """Replaces attention projections of a GPT-2 by products of two factors, in place and before an optimizer is made.

    The model is trained and used as before, but saved only after `merge_attention_projections`: GPT-2's files have no
    place for factors. (`mlra-scale import` and `export --format mlra` make folders that have.)

    Args:
        model: A GPT-2 of transformers, with any head.
        rank: R, from 1 to the model's width.
        projections: Which of q, k, v, o to factorise.
        init: `svd`: the nearest factors of the weights that the model has. Otherwise new factors, see `factor_stds`,
            with the configuration's initializer_range; as in GPT-2 the up factor of o begins smaller by
            1 / sqrt(2 L). Biases stay as they are.

    Raises:
        ValueError: The model has no attention of GPT-2, or one that has been replaced or attends to an encoder; or an
            argument is not one of those above. The model is then as it was.
    """
    attentions = list(_attentions(model))
    width = attentions[0].embed_dim
    if not 1 <= rank <= width:
        raise ValueError(f"rank is {rank}; use 1 to {width}")
    if not projections or not set(projections) <= {*"qkvo"}:
        raise ValueError(f"projections is {list(projections)}; name some of q, k, v, o")
    if any(attention.is_cross_attention for attention in attentions):
        raise ValueError("the model attends to an encoder (add_cross_attention), whose projections are other ones")
    if not all(isinstance(map_, Conv1D) for each in attentions for map_ in (each.c_attn, each.c_proj)):
        raise ValueError("the model's attention projections are not those of GPT-2: they have been replaced already")
    if init not in ("svd", *INITIALIZATIONS):
        raise ValueError(f"init is {init!r}; use svd, {', '.join(INITIALIZATIONS)}")
    std, scale = model.config.initializer_range, 1.0 / math.sqrt(2.0 * model.config.n_layer)
    found: list[tuple[Any, str, nn.Module]] = []
    for attention in attentions:
        if set(projections) & {*"qkv"}:
            joined, joined_bias = attention.c_attn.weight.T, attention.c_attn.bias
            parts = (
                _projection(weight, bias, rank if name in projections else None, init, std)
                for name, weight, bias in zip("qkv", joined.chunk(3), joined_bias.chunk(3), strict=True)
            )
            found.append((attention, "c_attn", JoinedProjections(*parts)))
        if "o" in projections:
            made = _projection(attention.c_proj.weight.T, attention.c_proj.bias, rank, init, std, scale)
            found.append((attention, "c_proj", made))
    for attention, name, module in found:  # all of them, or none after an error
        setattr(attention, name, module.train(attention.training))


def merge_attention_projections(model: PreTrainedModel) -> None:
    """Multiplies the factors of `replace_attention_projections`, in place: the model is a plain GPT-2 again.

    Raises:
        ValueError: The model has no attention of GPT-2.
    """
    for attention in _attentions(model):
        if isinstance(attention.c_attn, JoinedProjections):
            maps = [_dense(each) for each in (attention.c_attn.q, attention.c_attn.k, attention.c_attn.v)]
            attention.c_attn = _conv1d(torch.cat([weight for weight, _ in maps]), torch.cat([bias for _, bias in maps]))
            attention.c_attn.train(attention.training)
        if isinstance(attention.c_proj, LowRankLinear):
            attention.c_proj = _conv1d(*_dense(attention.c_proj)).train(attention.training)


def _attentions(model: nn.Module) -> Iterator[Any]:
    found = [module for module in model.modules() if isinstance(module, GPT2Attention)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention of GPT-2 (transformers' GPT2Attention)")
    return iter(found)


def _projection(
    weight: Tensor, bias: Tensor, rank: int | None, init: str, std: float, up_scale: float = 1.0
) -> nn.Module:
    """A map with this bias, dense with the weight [out, in] or at a rank; frozen if the weight is."""
    out_features, in_features = weight.shape
    result: nn.Linear | LowRankLinear
    if rank is None:
        result = last = nn.Linear(in_features, out_features, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            last.weight.copy_(weight)
    else:
        drawn = "gpt2" if init == "svd" else init
        result = LowRankLinear(in_features, out_features, rank, init=drawn, std=std, up_scale=up_scale).to(weight)
        last = result.up
        if init == "svd":
            result.set_dense(weight.detach())
    with torch.no_grad():
        last.bias.copy_(bias)
    return result.requires_grad_(weight.requires_grad)


def _dense(projection: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias of a map."""
    if isinstance(projection, LowRankLinear):
        weight = projection.dense_weight()
        return weight.requires_grad_(projection.up.weight.requires_grad), projection.up.bias
    assert isinstance(projection, nn.Linear)
    return projection.weight, projection.bias


def _conv1d(weight: Tensor, bias: Tensor) -> Conv1D:
    """A map of transformers' kind with this weight [out, in] and bias; frozen if the weight is."""
    out_features, in_features = weight.shape
    result = Conv1D(out_features, in_features).to(weight).requires_grad_(weight.requires_grad)
    with torch.no_grad():
        result.weight.copy_(weight.T)
        result.bias.copy_(bias)
    return result
