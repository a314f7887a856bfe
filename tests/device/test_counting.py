"""How the trace counts: kernels of operators on lists of tensors, bytes of messages."""

import pytest

from tests.support.device.launches import CHUNK, MAX_CHUNKS, MAX_TENSORS, multi_tensor_launches


@pytest.mark.parametrize(
    ("sizes", "depth", "launches"),
    [
        ([1], 1, 1),
        ([], 1, 0),
        ([0, 0], 1, 0),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 36, 4, 1),
        ([1] * 37, 4, 2),
        ([CHUNK * MAX_CHUNKS], 1, 1),
        ([CHUNK * MAX_CHUNKS + 1], 1, 2),
        # 200 chunks and 120 of the next tensor fill a launch; its other 80, and the third tensor, are the second.
        ([CHUNK * 200] * 2 + [5], 2, 2),
        ([CHUNK * 160] * 4, 4, 2),
    ],
)
def test_multi_tensor_kernels(sizes: list[int], depth: int, launches: int) -> None:
    assert multi_tensor_launches(sizes, depth, MAX_TENSORS) == launches
