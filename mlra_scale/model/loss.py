"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks, with an optional z-loss.

Shape suffixes: B batch, S sequence, V vocabulary on this rank.
"""

import torch

from mlra_scale.megatron import reduce_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from mlra_scale.model.context import ModelContext


def language_model_loss(
    context: ModelContext, logits_BSV: torch.Tensor, targets_BS: torch.Tensor, is_training: bool
) -> torch.Tensor:
    """Mean next-token cross-entropy in nats, computed in fp32.

    In training, `model.z_loss` = c > 0 adds c times the mean of log^2 Z, Z being the softmax normalizer (PaLM,
    Chowdhery et al. 2022, sec. 5); a validation loss is the cross-entropy alone.

    Args:
        context: The model's context.
        logits_BSV: This rank's columns of the logits; padded columns are -inf.
        targets_BS: Global token ids.
        is_training: Whether to add the z-loss.

    Returns:
        Scalar fp32, equal on all tensor-parallel ranks.
    """
    if context.model.z_loss == 0.0 or not is_training:
        return vocab_parallel_cross_entropy(logits_BSV, targets_BS).mean()
    target_logits_BS = _target_logits(context, logits_BSV, targets_BS)
    # Of a copy: Megatron's cross-entropy overwrites fp32 logits, which the line above still needs.
    losses_BS = vocab_parallel_cross_entropy(logits_BSV.to(torch.float32, copy=True), targets_BS)
    log_z_BS = losses_BS + target_logits_BS
    return losses_BS.mean() + context.model.z_loss * log_z_BS.square().mean()


def _target_logits(context: ModelContext, logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """Logit of the target token, [B, S] fp32, from whichever rank holds its column."""
    local_BS = targets_BS - context.tensor_rank * logits_BSV.size(-1)
    is_here_BS = (local_BS >= 0) & (local_BS < logits_BSV.size(-1))
    picked_BS = logits_BSV.gather(-1, local_BS.clamp(0, logits_BSV.size(-1) - 1).unsqueeze(-1)).squeeze(-1).float()
    # where, not a product: a column that is not the target's may be -inf.
    picked_BS = torch.where(is_here_BS, picked_BS, torch.zeros_like(picked_BS))
    return reduce_from_tensor_model_parallel_region(picked_BS, group=context.tensor_group)
