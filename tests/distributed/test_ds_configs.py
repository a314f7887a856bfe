"""Every file in ds_configs/ trains, in its layout and at tiny size, to the oracle's losses."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.oracle_runs import Pools, assert_losses_and_gradients, in_layout, oracle
from tests.distributed.steps import train
from tests.support.layouts import Layout

FILES = Path(__file__).parents[2] / "ds_configs"
OFFLOAD = "zero3_offload.json"
LAYOUTS = {
    "zero1_pipeline.json": Layout(tensor=2, pipeline=2),
    "zero1.json": Layout(tensor=2, data=2),
    "zero2.json": Layout(data=2),
    "zero3.json": Layout(tensor=2, data=2),
    OFFLOAD: Layout(data=2),
}


def test_all_files_are_listed_here() -> None:
    assert sorted(path.name for path in FILES.glob("*.json")) == sorted(LAYOUTS)


@pytest.mark.slow_except("zero1.json", "zero2.json", "zero3.json")
@pytest.mark.parametrize("name", LAYOUTS)
def test_file_trains_to_the_oracles_losses(worker_pool: Pools, name: str) -> None:
    layout = LAYOUTS[name]
    config = in_layout(layout)
    config = config.model_copy(update={"deepspeed": json.loads((FILES / name).read_text())})
    weights, expected = oracle(config, steps=3)
    # DeepSpeed compiles its CPUAdam at first use: a minute or two, once per machine.
    timeout = 420.0 if name == OFFLOAD else 120.0
    records = worker_pool(layout.world_size).run(train, config, 3, weights, timeout=timeout)
    np.testing.assert_allclose(records[0].gradient_norms, expected.gradient_norms, rtol=2e-6)
    assert_losses_and_gradients(config, records, expected)
