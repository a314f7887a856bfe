"""Every layout of the ZeRO engine traced on `cuda` without a GPU, and the options of the model at tensor 2.

Placement, memory, bytes, waits of the host, kernels, types.
"""

import pytest

from tests.support.device import fake_cuda
from tests.support.device.checks import problems
from tests.support.device.layouts import WITHOUT_PIPELINE, Layout
from tests.support.device.running import trace

pytestmark = pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing()))


@pytest.mark.slow_except("ZeRO 3 x tensor 2 x data 4")
@pytest.mark.parametrize("layout", WITHOUT_PIPELINE, ids=lambda layout: layout.name)
def test_a_layout_does_on_a_gpu_what_is_planned(layout: Layout) -> None:
    assert problems(trace(layout)) == []
