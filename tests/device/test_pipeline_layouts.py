"""Every layout of the pipeline engine traced on `cuda` without a GPU, and the layouts with 72 layers."""

from dataclasses import replace

import pytest

from tests.support.device import fake_cuda
from tests.support.device.checks import problems
from tests.support.device.layouts import DEEP, WITH_PIPELINE, Layout
from tests.support.device.running import trace

pytestmark = pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing()))


@pytest.mark.slow
@pytest.mark.parametrize("layout", WITH_PIPELINE, ids=lambda layout: layout.name)
def test_a_stage_does_on_a_gpu_what_is_planned(layout: Layout) -> None:
    assert problems(trace(layout)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("layout", DEEP, ids=lambda layout: layout.name)
def test_72_layers_do_what_is_planned(layout: Layout) -> None:
    assert problems(trace(replace(layout, num_layers=72))) == []
