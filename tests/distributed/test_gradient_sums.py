"""Micro-batches' bf16 gradients, joined and added by few kernels, give DeepSpeed's own sums to the last bit."""

from typing import Any

import numpy as np
import pytest

from mlra_scale.config import Config
from mlra_scale.parallel import gradient_sums, master
from tests.support.layouts import Layout, layout_config, micro_batches, pieces, start
from tests.support.pool import Pools

LAYOUTS = [Layout(tensor=2), Layout(data=2, stage=1), Layout(pipeline=2)]


def train(rank: int, world_size: int, config: Config, elements_per_piece: int | None) -> tuple[list[float], list[Any]]:
    """Trains three steps; returns their gradient norms and this rank's weights. None: DeepSpeed adds up by itself."""
    ours, size = master.GradientSums, gradient_sums._ELEMENTS_PER_PIECE
    if elements_per_piece is None:
        master.GradientSums = lambda optimizer: None  # type: ignore[assignment, misc, return-value]
    else:
        gradient_sums._ELEMENTS_PER_PIECE = elements_per_piece
    try:
        engine = start(config, world_size)
        assert engine.plan.accumulation_steps > 1
        results = [engine.train_batch(micro_batches(engine, step), 1e-3) for step in range(3)]
        return [result.gradient_norm for result in results], pieces(engine, engine.owned_fragments())
    finally:
        master.GradientSums = ours  # type: ignore[misc]
        gradient_sums._ELEMENTS_PER_PIECE = size


@pytest.mark.slow_except("tp1pp2dp1 zero0")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_sums_are_deepspeeds_own(worker_pool: Pools, layout: Layout) -> None:
    """All of a rank's gradients joined to one piece, or a few parameters at a time with larger ones uncopied."""
    pool, config = worker_pool(2), layout_config(layout, train__precision="bf16")
    expected = pool.run(train, config, None)
    for elements_per_piece in (1 << 24, 1000):
        found = pool.run(train, config, elements_per_piece)
        for (norms, weights), (expected_norms, expected_weights) in zip(found, expected, strict=True):
            assert norms == expected_norms
            for piece, expected_piece in zip(weights, expected_weights, strict=True):
                assert piece[:3] == expected_piece[:3]
                np.testing.assert_array_equal(piece[3], expected_piece[3], err_msg=str(piece[0]))
