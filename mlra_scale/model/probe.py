"""The probe path: what passes through blocks and head, shown to observers outside the hot path.

Nothing of a pass is kept unless the observer keeps it: at 72 layers the attention logits of one sample alone are
several GiB, so they are computed piece by piece, on demand.

Shape suffixes: B batch, S sequence (query, then key), D hidden, N heads on this rank, H head dimension.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mlra_scale.model.block import Block
from mlra_scale.model.context import Stream
from mlra_scale.model.embedding import ScoreRecorder, TokenEmbedding
from mlra_scale.model.tensor_parallel import whole_hidden

LOGITS_AT_ONCE = 2**25
"""At most so many logits, or those of one head, are in memory at a time: 128 MiB in fp32."""


@dataclass(frozen=True)
class LogitPiece:
    """Attention logits of some heads on one sample."""

    sample: int  # in the micro-batch
    first_head: int  # first of the heads, counted on this tensor-parallel rank
    logits_NSS: torch.Tensor  # scaled logits in fp32, -inf where attention is not allowed
    allowed_SS: torch.Tensor  # where it is allowed; the same for all heads


@dataclass(frozen=True)
class Heads:
    """Queries and keys of one block on one micro-batch, of this tensor-parallel rank's heads."""

    block: int
    q_BNSH: torch.Tensor  # queries, as they enter the product
    k_BNSH: torch.Tensor  # keys, likewise
    # True where attention is allowed; None: to all keys that are not later than the query.
    mask_B1SS: torch.Tensor | None

    def logits(self, num_samples: int | None = None) -> Iterator[LogitPiece]:
        """Yields the attention logits of the first samples (None: of all) piece by piece.

        A caller that deletes a piece before it takes the next one holds a single piece at a time. The product is taken
        in fp32 whatever the type of queries and keys: a fused kernel does not round logits to 16 bits either.
        """
        num_heads, size = self.q_BNSH.shape[1:3]
        heads_at_once = max(1, LOGITS_AT_ONCE // size**2)
        if self.mask_B1SS is None:
            allowed_SS = torch.ones(size, size, dtype=torch.bool, device=self.q_BNSH.device).tril_()
        for sample in range(len(self.q_BNSH) if num_samples is None else num_samples):
            if self.mask_B1SS is not None:
                allowed_SS = self.mask_B1SS[sample, 0]
            for first_head in range(0, num_heads, heads_at_once):
                some = slice(first_head, first_head + heads_at_once)
                # Without a name here: this generator would keep the piece while it computes the next one.
                yield LogitPiece(sample, first_head, self._piece(sample, some, allowed_SS), allowed_SS)

    def _piece(self, sample: int, heads: slice, allowed_SS: torch.Tensor) -> torch.Tensor:
        """Logits of some heads on one sample, [N, S, S] in fp32."""
        q_NSH, k_NSH = self.q_BNSH[sample, heads].float(), self.k_BNSH[sample, heads].float()
        logits_NSS = (q_NSH @ k_NSH.transpose(-1, -2)).div_(math.sqrt(q_NSH.size(-1)))
        return logits_NSS.masked_fill_(~allowed_SS, -math.inf)


SeeHeads = Callable[[int, Heads], None]
SeeHidden = Callable[[int, int, torch.Tensor], None]


@contextmanager
def observe(module: nn.Module, see_heads: SeeHeads, see_hidden: SeeHidden | None = None) -> Iterator[None]:
    """While open, shows every forward pass through `module` to the observers; for passes without gradients.

    Args:
        module: The engine's module (a pipeline stage or the whole model).
        see_heads: Called with (pass, heads) in every block that the module holds; passes are counted from 0.
        see_hidden: Called with (pass, depth, hidden_BSD) for the residual stream: depth 0 is where it enters block 0,
            depth i + 1 where it leaves block i. It is whole, and the same on all tensor-parallel ranks.
    """
    blocks = [child for child in module.modules() if isinstance(child, Block)]
    handles: list[RemovableHandle] = []
    try:
        for block in blocks:
            _show_heads(block, see_heads)
            if see_hidden is not None:
                handles += _show_hidden(block, see_hidden)
        yield
    finally:
        for block in blocks:
            block.attention.recorder = None
        for handle in handles:
            handle.remove()


@contextmanager
def observe_scores(module: nn.Module, see_scores: ScoreRecorder) -> Iterator[None]:
    """While open, passes without gradients score each target by itself; targets may be loss.NO_TARGET.

    Args:
        module: The engine's module.
        see_scores: Called with what loss.head_scores returns, for every micro-batch in turn, where the head is.
    """
    embeddings = [child for child in module.modules() if isinstance(child, TokenEmbedding)]
    try:
        for embedding in embeddings:
            embedding.recorder = see_scores
        yield
    finally:
        for embedding in embeddings:
            embedding.recorder = None


def _show_heads(block: Block, see_heads: SeeHeads) -> None:
    passes = count()
    index = block.attention.block

    def record(q_BNSH: torch.Tensor, k_BNSH: torch.Tensor, mask_B1SS: torch.Tensor | None) -> None:
        see_heads(next(passes), Heads(index, q_BNSH, k_BNSH, mask_B1SS))

    block.attention.recorder = record


def _show_hidden(block: Block, see_hidden: SeeHidden) -> list[RemovableHandle]:
    index, inputs, outputs = block.attention.block, count(), count()

    def hidden_of(stream: Stream) -> torch.Tensor:
        return whole_hidden(block.context, block.context.unpack(stream)[0])

    def see_input(_: nn.Module, arguments: tuple[Stream]) -> None:
        see_hidden(next(inputs), 0, hidden_of(arguments[0]))

    def see_output(_: nn.Module, __: tuple[Stream], output: Stream) -> None:
        see_hidden(next(outputs), index + 1, hidden_of(output))

    handles = [block.register_forward_hook(see_output)]
    if index == 0:
        handles.append(block.register_forward_pre_hook(see_input))
    return handles
