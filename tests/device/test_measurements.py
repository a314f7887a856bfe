"""What is measured and saved beside training steps, traced: listed waits only, and no peak above the step's."""

import pytest

from tests.support.device import fake_cuda
from tests.support.device.checks import unlisted
from tests.support.device.expected import MEASURED_WAITS, MEMORY_TOLERANCE
from tests.support.device.layouts import MEASURING, Layout
from tests.support.device.running import trace

pytestmark = [
    pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing())),
    pytest.mark.slow,
]


@pytest.mark.parametrize("layout", MEASURING, ids=lambda layout: layout.name)
def test_measurements_wait_where_the_list_says_and_need_less_than_a_step(layout: Layout) -> None:
    report = trace(layout)
    for name, allowed in MEASURED_WAITS.items():
        phase = report.phases[name]
        assert list(unlisted(phase, allowed)) == [], name
        assert not phase.misplaced, name
        if name != "noise scale":  # which is a pass of training
            assert phase.peak <= report.step.peak, name
    planned = report.results["planned_snapshot"]
    snapshot = report.phases["snapshot"]
    assert snapshot.host_peak - snapshot.host_start == pytest.approx(planned, rel=MEMORY_TOLERANCE)
