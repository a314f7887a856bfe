"""The probe path: attention logits and entropies of chosen batches, outside the hot path."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mlra_scale.model.attention import SelfAttention


@dataclass(frozen=True)
class AttentionRecord:
    """Attention of one block on one micro-batch, this tensor-parallel rank's heads.

    Attributes:
        block: Index of the block.
        logits_BNSS: Scaled logits in fp32, -inf where attention is not allowed.
        entropy_BNS: Entropy of each query's attention weights in nats (Zhai et al. 2023, arXiv 2303.06296).
    """

    block: int
    logits_BNSS: torch.Tensor
    entropy_BNS: torch.Tensor


@contextmanager
def record_attention(module: nn.Module) -> Iterator[list[AttentionRecord]]:
    """While open, every forward pass through `module` appends one record per block that it holds.

    Args:
        module: The engine's module (a pipeline stage or the whole model).

    Yields:
        The list that fills up.
    """
    records: list[AttentionRecord] = []

    def append(block: int, logits_BNSS: torch.Tensor, entropy_BNS: torch.Tensor) -> None:
        records.append(AttentionRecord(block, logits_BNSS, entropy_BNS))

    attentions = [child for child in module.modules() if isinstance(child, SelfAttention)]
    for attention in attentions:
        attention.recorder = append
    try:
        yield records
    finally:
        for attention in attentions:
            attention.recorder = None
