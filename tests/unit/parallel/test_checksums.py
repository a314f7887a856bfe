"""Checksums: no single flipped bit is missed, wherever it is."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.parallel import checksums
from mlra_scale.parallel.checksums import checksum_of
from mlra_scale.stability import corruption

DEVICE = torch.device("cpu")
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}


def flip(values: torch.Tensor, index: int, bit: int) -> None:
    bits = values.view(BITS[values.dtype])
    size = 8 * values.element_size()
    bits[index] ^= (1 << bit) - ((1 << size) if bit == size - 1 else 0)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*BITS]), st.integers(1, 70), st.data())
def test_a_flipped_bit_changes_the_checksum_and_flipping_it_back_restores_it(
    dtype: torch.dtype, length: int, data: st.DataObject
) -> None:
    tensors = [torch.randn(length, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    before = checksum_of(tensors, DEVICE)
    which, index = data.draw(st.integers(0, 1)), data.draw(st.integers(0, length - 1))
    bit = data.draw(st.integers(0, 8 * tensors[0].element_size() - 1))
    flip(tensors[which], index, bit)
    assert checksum_of(tensors, DEVICE) != before
    flip(tensors[which], index, bit)
    assert checksum_of(tensors, DEVICE) == before


def test_the_same_bit_of_two_elements_does_not_cancel() -> None:
    values = torch.zeros(2**12)
    before = checksum_of([values], DEVICE)
    for first, second in ((0, 1), (3, 4000), (17, 2048)):
        for bit in range(32):
            changed = values.clone()
            flip(changed, first, bit)
            flip(changed, second, bit)
            assert checksum_of([changed], DEVICE) != before, (first, second, bit)


def test_the_order_counts_and_the_last_element_of_a_long_tensor_too() -> None:
    values = torch.randn(3 * 2**18 + 5)
    before = checksum_of([values], DEVICE)
    assert checksum_of([values.flip(0)], DEVICE) != before
    assert checksum_of([torch.roll(values, 2**18)], DEVICE) != before, "chunks that have changed places"
    changed = values.clone()
    flip(changed, len(values) - 1, 0)
    assert checksum_of([changed], DEVICE) != before
    assert checksum_of([values.reshape(1, -1).T], DEVICE) == before, "the shape does not count"


def test_places_have_the_same_numbers_where_they_are_recorded_and_where_they_are_compared() -> None:
    for name in ("FORWARD", "BACKWARD", "REDUCED", "PROPOSED"):
        assert getattr(checksums, name) == getattr(corruption, name)
