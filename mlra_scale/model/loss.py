"""The output head and the cross-entropy in one, over a vocabulary that is split over tensor-parallel ranks.

Logits never exist as a whole: they are computed for a chunk of tokens at a time, turned into their gradient in place,
and multiplied into the gradients of the hidden state and of the embedding at once. The backward pass only scales those
two. Nothing is computed twice.

Shape suffixes: T tokens (batch times sequence), C tokens of a chunk, D hidden, V vocabulary on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from mlra_scale.model.context import ModelContext
from mlra_scale.model.head_chunks import chunks, num_chunks

NO_TARGET = -1
"""Target of a position that is not scored, in `head_scores`."""
_NO_COLUMN = 2**62


def head_loss(
    context: ModelContext,
    hidden_BSD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_BS: torch.Tensor,
    is_training: bool,
) -> torch.Tensor:
    """Mean next-token cross-entropy in nats, computed in fp32 from logits in the type of the weights.

    In training, `model.z_loss` = c > 0 adds c times the mean of log^2 Z, Z being the softmax normalizer (PaLM,
    Chowdhery et al. 2022, sec. 5); a validation loss is the cross-entropy alone.

    Args:
        context: The model's context.
        hidden_BSD: What enters the head; its gradient is this rank's share, to be summed over the ranks.
        weight_VD: This rank's rows of the embedding.
        bias_V: Added to the logits, -inf for padded columns; has no gradient.
        targets_BS: Global token ids.
        is_training: Whether to add the z-loss.

    Returns:
        Scalar fp32, equal on all tensor-parallel ranks.
    """
    z_loss = context.model.z_loss if is_training else 0.0
    head = _Head(weight_VD.detach(), bias_V, context.tensor_group, z_loss)
    loss: torch.Tensor = _HeadLoss.apply(
        hidden_BSD.flatten(0, 1), weight_VD, targets_BS.flatten(), head, torch.is_grad_enabled()
    )
    return loss


@torch.no_grad()
def head_scores(
    context: ModelContext,
    hidden_BSD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_BS: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores every target by itself; the arguments are those of `head_loss`, and targets may be NO_TARGET.

    Returns:
        The cross-entropy of each target in nats, fp32 [B, S], and whether it is the most likely token, of equal ones
        the first as of argmax, bool [B, S]; 0 and True without a target. Both are equal on all tensor-parallel ranks.
    """
    head = _Head(weight_VD, bias_V, context.tensor_group, 0.0)
    hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
    losses_T = torch.empty(targets_T.shape, dtype=torch.float32, device=targets_T.device)
    first_T = torch.empty_like(targets_T)
    count = num_chunks(len(targets_T), weight_VD.size(0), weight_VD.device.type, weight_VD.dtype == torch.float16)
    for chunk in chunks(len(targets_T), count):
        losses_T[chunk], exponentials_CV, *_ = head.losses(hidden_TD[chunk], targets_T[chunk])
        # The exponential of the largest logit, less itself, is 1; on a rank without it there is none.
        values_C, columns_C = exponentials_CV.max(dim=-1)
        del exponentials_CV
        first_T[chunk] = torch.where(values_C == 1.0, columns_C + head.first_column, _NO_COLUMN)
    if head.group.size() > 1:
        dist.all_reduce(first_T, op=dist.ReduceOp.MIN, group=head.group)
    is_first_T, is_left_out_T = first_T == targets_T, targets_T == NO_TARGET
    losses_T.masked_fill_(is_left_out_T, 0.0)
    return losses_T.view_as(targets_BS), (is_first_T | is_left_out_T).view_as(targets_BS)


class _Head:
    """The head's weights and what is computed with them for a chunk of tokens."""

    def __init__(
        self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, group: dist.ProcessGroup, z_loss: float
    ) -> None:
        self.weight_VD, self.bias_V, self.group, self.z_loss = weight_VD, bias_V, group, z_loss
        self.first_column = group.rank() * weight_VD.size(0)

    def losses(self, hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Computes the losses of a chunk.

        Returns:
            losses_C; exp(logit - max) [C, V] in fp32; its sum over all ranks' columns [C]; log Z [C]; this rank's
            column of the target [C]; whether it has that column [C].
        """
        logits_CV = functional.linear(hidden_CD, self.weight_VD, self.bias_V).float()
        largest_C = logits_CV.amax(dim=-1)
        columns_C = targets_C - self.first_column
        is_here_C = (columns_C >= 0) & (columns_C < logits_CV.size(-1))
        columns_C = columns_C.clamp(0, logits_CV.size(-1) - 1)
        if self.group.size() > 1:
            dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=self.group)
        target_C = logits_CV.gather(-1, columns_C.unsqueeze(-1)).squeeze(-1)
        # where, not a product: a column that is not the target's may be -inf.
        target_C = torch.where(is_here_C, target_C, torch.zeros_like(target_C))
        exponentials_CV = logits_CV.sub_(largest_C.unsqueeze(-1)).exp_()
        sum_C = exponentials_CV.sum(dim=-1)
        if self.group.size() > 1:
            packed_2C = torch.stack([sum_C, target_C])
            dist.all_reduce(packed_2C, group=self.group)
            sum_C, target_C = packed_2C.unbind()
        log_z_C = sum_C.log() + largest_C
        losses_C = log_z_C - target_C
        if self.z_loss:
            losses_C = losses_C + self.z_loss * log_z_C.square()
        return losses_C, exponentials_CV, sum_C, log_z_C, columns_C, is_here_C

    def gradient(self, exponentials_CV: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of the summed losses by the logits, softmax (1 + 2 c log Z) - onehot(target), [C, V].

        c is the coefficient of the z-loss. The arguments are what `losses` returns after the losses.
        """
        sum_C, log_z_C, columns_C, is_here_C = rest
        factor_C = (1.0 + 2.0 * self.z_loss * log_z_C) / sum_C
        gradient_CV = exponentials_CV.mul_(factor_C.unsqueeze(-1))
        gradient_CV.scatter_add_(-1, columns_C.unsqueeze(-1), -is_here_C.to(gradient_CV).unsqueeze(-1))
        return gradient_CV.to(self.weight_VD.dtype)

    def add_gradients(
        self,
        hidden_CD: torch.Tensor,
        targets_C: torch.Tensor,
        hidden_gradient_CD: torch.Tensor,
        weight_gradient_VD: torch.Tensor | None,
        num_chunks: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss of a chunk and its share of the gradients.

        The gradient of `hidden_CD` is written into `hidden_gradient_CD`. `weight_gradient_VD` is the sum of the chunks
        before, None for the first one; of several chunks it is in fp32.

        Returns:
            The sum of the losses, and the sum of the weight's gradients with this chunk.
        """
        losses_C, exponentials_CV, *rest = self.losses(hidden_CD, targets_C)
        gradient_CV = self.gradient(exponentials_CV, *rest)
        del exponentials_CV  # in bf16 and fp16 twice the size of the gradient
        torch.mm(gradient_CV, self.weight_VD, out=hidden_gradient_CD)
        if weight_gradient_VD is None:
            weight_gradient_VD = torch.mm(gradient_CV.t(), hidden_CD)
            if num_chunks > 1:
                weight_gradient_VD = weight_gradient_VD.float()
        elif weight_gradient_VD.dtype == gradient_CV.dtype:
            weight_gradient_VD.addmm_(gradient_CV.t(), hidden_CD)
        else:
            weight_gradient_VD += gradient_CV.t() @ hidden_CD
        return losses_C.sum(), weight_gradient_VD


class _HeadLoss(torch.autograd.Function):
    """(hidden [T, D], weight [V, D]) -> mean loss; both gradients are formed in the forward pass.

    They are kept as those of the sum of the losses: in fp16, those of the mean would lose small probabilities before
    the loss scale is applied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        head: _Head,
        has_backward: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        num_tokens = targets_T.numel()
        is_fp16 = weight_VD.dtype == torch.float16
        count = num_chunks(num_tokens, weight_VD.size(0), weight_VD.device.type, is_fp16)
        ctx.num_tokens, ctx.gradients = num_tokens, None
        hidden_gradient_TD = torch.empty_like(hidden_TD) if has_backward else None
        weight_gradient_VD = None
        for chunk in chunks(num_tokens, count):
            if hidden_gradient_TD is None:
                total += head.losses(hidden_TD[chunk], targets_T[chunk])[0].sum()
                continue
            # Tensors as large as a chunk's logits are local to this call, so that they are freed before the next chunk.
            loss, weight_gradient_VD = head.add_gradients(
                hidden_TD[chunk], targets_T[chunk], hidden_gradient_TD[chunk], weight_gradient_VD, count
            )
            total += loss
        if has_backward:
            ctx.gradients = [hidden_gradient_TD, weight_gradient_VD]
        return total / num_tokens

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.gradients is not None, "a second backward pass through one loss"
        hidden_gradient_TD, weight_gradient_VD = ctx.gradients
        ctx.gradients = None
        scale = outer[0] / ctx.num_tokens
        return hidden_gradient_TD.mul_(scale), weight_gradient_VD.mul_(scale), None, None, None
