"""Every layout with every kind of attention, exported in both formats: the exports give the engines' own logits."""

from pathlib import Path
from typing import Any

import pytest

from tests.parity.export_matrix import ATTENTIONS, LARGE_LAYOUTS, LAYOUTS, Pools, run_case
from tests.support.layouts import Layout

pytestmark = pytest.mark.nightly
ALL_LAYOUTS = LAYOUTS | LARGE_LAYOUTS


@pytest.mark.parametrize("overrides", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("layout", ALL_LAYOUTS.values(), ids=ALL_LAYOUTS)
def test_exports_of_every_layout_and_attention(
    tmp_path: Path, worker_pool: Pools, layout: Layout, overrides: dict[str, Any]
) -> None:
    outcome = run_case(worker_pool, tmp_path, layout, **overrides)
    assert max(outcome.gpt2, outcome.mlra) < 1e-4
