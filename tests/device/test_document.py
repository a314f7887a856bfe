"""docs/device.md has a row for every layout, and the lists of waits as tests/support/device/expected.py has them."""

from tests.support.device import document, expected
from tests.support.device.layouts import ALL


def test_the_document_names_every_layout() -> None:
    names = [line.split("|")[1].strip() for line in document.written("layouts").splitlines()[2:]]
    assert names == [layout.name for layout in ALL]


def test_the_document_has_the_lists_of_waits() -> None:
    remedy = "run python -m tests.device --write"
    assert document.written("waits") == document.waits_table(), remedy
    assert document.written("flow control") == document.flow_control_table(), remedy
    assert document.written("measured waits") == document.measured_table(), remedy


def test_every_layout_has_a_ceiling_of_kernels() -> None:
    assert set(expected.LAUNCHES) == {layout.name for layout in ALL}
