"""Every file in ds_configs/ trains, in its layout and at tiny size, to the oracle's losses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.steps import train
from tests.support.layouts import Layout, assemble, canonical_weights, layout_config, table_of
from tests.support.oracle import assert_gradients_close, reference_run
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]

FILES = Path(__file__).parents[2] / "ds_configs"
LAYOUTS = {
    "zero1_pipeline.json": Layout(tensor=2, pipeline=2),
    "zero1.json": Layout(tensor=2, data=2),
    "zero2.json": Layout(data=2),
    "zero3.json": Layout(tensor=2, data=2),
}
OFFLOAD = "zero3_offload.json"


def run_file(worker_pool: Pools, name: str, layout: Layout, timeout: float = 120.0, **overrides: Any) -> None:
    config = layout_config(layout, optim__eps=1e-4, **overrides)
    config = config.model_copy(update={"deepspeed": json.loads((FILES / name).read_text())})
    weights = canonical_weights(config.model)
    expected = reference_run(config, weights, 3)
    records = worker_pool(layout.world_size).run(train, config, 3, weights, timeout=timeout)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(records[0].gradient_norms, expected.gradient_norms, rtol=2e-6)
    gradients = assemble(table_of(config), layout.tensor, [record.gradients for record in records])
    assert_gradients_close(gradients, expected.gradients)


def test_all_files_are_listed_here() -> None:
    assert sorted(path.name for path in FILES.glob("*.json")) == sorted([*LAYOUTS, OFFLOAD])


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_trains_to_the_oracles_losses(worker_pool: Pools, name: str) -> None:
    run_file(worker_pool, name, LAYOUTS[name])


@pytest.mark.slow
def test_offload_trains_to_the_oracles_losses(worker_pool: Pools) -> None:
    # DeepSpeed compiles its CPUAdam at first use: a minute or two, once per machine.
    run_file(worker_pool, OFFLOAD, Layout(data=2), timeout=420.0)
