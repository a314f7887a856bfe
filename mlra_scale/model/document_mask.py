"""The attention mask where attention stops at document boundaries, computed once for all blocks of a pass.

Two forms of the same mask:

    additive   [B, 1, S, S] of the stream's type: 0 where attention is allowed, -inf elsewhere. For
               scaled_dot_product_attention, which takes such a mask as it is; a boolean one it converts in every block,
               and each block keeps its copy for the backward pass.
    blocks     a BlockMask of flex_attention, which skips blocks that are masked as a whole and keeps no S x S matrix.
               It needs a GPU and Triton and was not measured; its forward pass is compared on the CPU.

A mask lives as long as the document ids from which it was computed.

Shape suffixes: B batch, S sequence (query, then key).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mlra_scale.config import ModelConfig

if TYPE_CHECKING:  # the module loads the compiler
    from torch.nn.attention.flex_attention import BlockMask

AttentionMask: TypeAlias = "torch.Tensor | BlockMask"


def has_flex_attention(device_type: str, precision: str, model: ModelConfig) -> bool:
    """Returns whether attention within documents runs through flex_attention.

    It needs a GPU with Triton, 16 bits, heads of a width that its kernels support, and no attention dropout, which
    needs the attention weights as a whole.
    """
    has_kernel = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    return has_kernel and precision != "fp32" and model.head_dim >= 16 and model.attention_dropout == 0.0


class DocumentMasks:
    """The masks of the document ids that are in use; with `has_blocks` those of flex_attention."""

    def __init__(self, has_blocks: bool) -> None:
        self.has_blocks = has_blocks
        # By storage, and by the part of it that the ids are: ZeRO 3's hooks give each module another view of the ids.
        self._masks: Any = WeakIdKeyDictionary()

    def of(self, documents_BS: torch.Tensor, dtype: torch.dtype) -> AttentionMask:
        """Returns the mask for queries and keys of a type; the same object for the same ids, which must not change."""
        storage = documents_BS.untyped_storage()
        masks: dict[Any, AttentionMask] | None = self._masks.get(storage)
        if masks is None:
            masks = self._masks[storage] = {}
        part = documents_BS.storage_offset(), documents_BS.shape, documents_BS.stride(), dtype
        if part not in masks:
            masks[part] = block_mask(documents_BS) if self.has_blocks else additive_mask(documents_BS, dtype)
        return masks[part]


def allowed(documents_BS: torch.Tensor) -> torch.Tensor:
    """Boolean [B, 1, S, S]: True where the key is not later than the query and of the same document."""
    same = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return same.tril().unsqueeze(1)


def additive_mask(documents_BS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the mask that is added to attention logits, [B, 1, S, S]."""
    zero = torch.zeros((), dtype=dtype, device=documents_BS.device)
    return zero.masked_fill(~allowed(documents_BS), float("-inf"))


def block_mask(documents_BS: torch.Tensor) -> BlockMask:
    """Returns the mask of flex_attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    # A copy: a mask that held the ids themselves would keep them, and so itself, alive for ever.
    ids_BS = documents_BS.clone()

    def is_allowed(b: torch.Tensor, _: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (ids_BS[b, q] == ids_BS[b, k])

    num_samples, size = documents_BS.shape
    return create_block_mask(is_allowed, num_samples, None, size, size, device=documents_BS.device)


def allowed_by(mask: AttentionMask) -> torch.Tensor:
    """Returns where a mask allows attention, boolean [B, 1, S, S]."""
    if isinstance(mask, torch.Tensor):
        return mask == 0
    num_samples, _, size, _ = mask.shape
    position_S = torch.arange(size, device=mask.kv_indices.device)
    sample_B = torch.arange(num_samples, device=position_S.device)
    return mask.mask_mod(sample_B[:, None, None, None], position_S[0], position_S[:, None], position_S)


def attend_blocks(q_BNSH: torch.Tensor, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Returns attention's output by flex_attention, [B, N, S, H]."""
    heads_BNSH: torch.Tensor = _compiled_flex_attention()(q_BNSH, k_BNSH, v_BNSH, block_mask=mask)
    return heads_BNSH


@cache
def _compiled_flex_attention() -> Any:
    """flex_attention as one kernel; without the compiler it would compute all logits at once."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
