"""Keyed randomness: every random number is a pure function of a key, never of a rank, a micro-batch or a history.

Initial weights come from a generator seeded by (seed, parameter name). Dropout masks come from a counter-based hash
(the finalizer of SplitMix64; Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") of (seed,
global sample index, site, global head, element): the index of a sample counts on over the run, so it stands for the
step as well. The same mask is drawn under recomputation, after a resume and in every layout, on CPU and GPU alike.

Shape suffixes: B batch, S sequence, D hidden, N heads.
"""

import hashlib

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key_of(seed: int, name: str) -> int:
    """Returns a 63-bit key of (seed, name), equal on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """Returns a CPU generator whose stream depends on (seed, name) only."""
    return torch.Generator(device="cpu").manual_seed(key_of(seed, name))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_int64(x: torch.Tensor) -> torch.Tensor:
    """Mixes every int64 element into 64 well-distributed bits (bijective)."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _keep_mask(key: torch.Tensor, num_elements: int, probability: float, first: int = 0) -> torch.Tensor:
    """Bernoulli(1 - probability) mask of elements number `first` and on, of shape key.shape + [num_elements]."""
    counter = torch.arange(first + 1, first + num_elements + 1, device=key.device, dtype=torch.int64) * _GOLDEN
    bits = _shift_right(hash_int64(key.unsqueeze(-1) + counter), 11)
    return bits >= int(probability * (1 << 53))


def dropout_hidden(
    hidden_BSD: torch.Tensor, probability: float, key: int, sample_ids_B: torch.Tensor, first_position: int = 0
) -> torch.Tensor:
    """Inverted dropout of a hidden state: returns the kept elements times 1 / (1 - p).

    Args:
        hidden_BSD: Replicated over tensor-parallel ranks, or split along the sequence.
        probability: Of zeroing an element, 0 <= p < 1.
        key: Of (seed, layer, site).
        sample_ids_B: Global index of each sample, int64.
        first_position: Where in the sequence the values begin: a position's mask does not depend on the split.
    """
    keys_B = hash_int64(sample_ids_B + key)
    first = first_position * hidden_BSD.size(-1)
    keep = _keep_mask(keys_B, hidden_BSD[0].numel(), probability, first).view(hidden_BSD.shape)
    return hidden_BSD * keep.to(hidden_BSD.dtype) * (1.0 / (1.0 - probability))


def dropout_attention(
    weights_BNSS: torch.Tensor, probability: float, key: int, sample_ids_B: torch.Tensor, first_head: int
) -> torch.Tensor:
    """Dropout of attention weights; a head's mask depends on its global number, so it is the same for any TP degree.

    `first_head`: Global number of this rank's first head.
    """
    heads_N = torch.arange(first_head, first_head + weights_BNSS.size(1), device=weights_BNSS.device)
    keys_BN = hash_int64(hash_int64(sample_ids_B + key).unsqueeze(1) + heads_N)
    keep = _keep_mask(keys_BN, weights_BNSS[0, 0].numel(), probability).view(weights_BNSS.shape)
    return weights_BNSS * keep.to(weights_BNSS.dtype) * (1.0 / (1.0 - probability))
