"""The trace sees what it is there for: each fault that is put into the code on purpose makes it fail."""

from dataclasses import replace

import pytest

from tests.support.device import fake_cuda
from tests.support.device.checks import problems
from tests.support.device.layouts import LAYOUTS, TENSOR
from tests.support.device.running import TraceError, trace

pytestmark = pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing()))
SMALL = replace(TENSOR, name="small", num_layers=2, num_micro_batches=3)
TOGETHER = {
    "reads_a_value": "for item in tests/support/device/faults.py",
    "waits_if_behind": "for event.synchronize in tests/support/device/faults.py",
    "gathers_from_all": "bytes are sent in a step over ",
    "copies_from_host": "for copy cpu to cuda in tests/support/device/faults.py",
    "leaves_a_buffer": "left_behind is not on the device",
    "multiplies_in_fp32": "matrix products of fp32: mm tests/support/device/faults.py",
    "sends_twice": "tensor: ",
}
"""Fault, and the words in which the trace complains."""


@pytest.mark.slow
def test_faults_are_found() -> None:
    found = problems(trace(SMALL, tuple(TOGETHER)))
    before = problems(trace(SMALL))
    for fault, words in TOGETHER.items():
        assert [line for line in found if words in line], fault
        assert not [line for line in before if words in line], fault


@pytest.mark.slow
def test_a_tensor_on_the_wrong_device_ends_the_trace() -> None:
    with pytest.raises(TraceError, match="Expected all tensors to be on the same device"):
        trace(SMALL, ("mixes_devices",))


@pytest.mark.slow
def test_a_kept_chunk_is_found() -> None:
    layout = LAYOUTS["several head chunks"]
    assert not [line for line in problems(trace(layout)) if "the peak is" in line]
    assert [line for line in problems(trace(layout, ("keeps_a_chunk",))) if "the peak is" in line]
