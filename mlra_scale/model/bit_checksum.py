"""Checksums of the bits of tensors, computed on their device without a wait of the host.

    sum over elements of  bits(element) * weight(position)   mod 2^64,   every weight odd,

in integer arithmetic, so that neither order nor cuts matter: the checksums of a tensor's pieces add up to that of the
whole. A single element that differs always changes the sum, because its odd weight has an inverse.
"""

from functools import lru_cache

import torch

from mlra_scale.model.randomness import hash_int64

BLOCK = 2**18
"""Positions whose weights are kept on a device, 8 bytes each; one weight more belongs to each block."""
_ACROSS = 0xC2B2AE3D27D4EB4F
MODULUS = 2**64
_LANES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bit_checksum(values: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Returns the checksum of elements start, start + 1, ... of a flattened tensor, an int64 scalar on their device."""
    lanes = values.detach().reshape(-1).view(_LANES[values.element_size()])
    weights = position_weights(values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    position, stop = start, start + lanes.numel()
    while position < stop:
        block, offset = divmod(position, BLOCK)
        count = min(BLOCK - offset, stop - position)
        part = (lanes[position - start : position - start + count] * weights[offset : offset + count]).sum()
        total += part * _signed(block * _ACROSS % MODULUS | 1)
        position += count
    return total


@lru_cache(maxsize=8)
def position_weights(device: torch.device) -> torch.Tensor:
    """Returns an odd number for every position of a block, made at the first call on the stream of that call.

    A stream whose checksums are the first ones would not be waited for by the others: call it on theirs before.
    """
    return hash_int64(torch.arange(BLOCK, device=device)) | 1


def _signed(number: int) -> int:
    """Returns the int64 with the same bits."""
    return number - MODULUS if number >= MODULUS // 2 else number
