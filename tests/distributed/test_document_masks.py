"""The mask of documents is made once per micro-batch and rank, whatever an engine does to the tensors on their way."""

import pytest

from mlra_scale.config import Config
from mlra_scale.model import document_mask
from tests.support.layouts import Layout, layout_config, micro_batches, start
from tests.support.pool import Pools


def masks_of_a_step(rank: int, world_size: int, config: Config) -> tuple[int, int]:
    """Returns how many masks a step makes, and its number of micro-batches."""
    made = 0
    make = document_mask.additive_mask

    def counted(*arguments: object) -> object:
        nonlocal made
        made += 1
        return make(*arguments)  # type: ignore[arg-type]

    engine = start(config, world_size)
    document_mask.additive_mask = counted  # type: ignore[assignment]
    try:
        engine.train_batch(micro_batches(engine, 0), 1e-3)
    finally:
        document_mask.additive_mask = make
    return made, engine.plan.accumulation_steps


@pytest.mark.slow_except("tp1pp2dp1 zero0")
@pytest.mark.parametrize("layout", [Layout(data=2, stage=1), Layout(data=2, stage=3), Layout(pipeline=2)], ids=str)
def test_blocks_share_the_mask_of_a_micro_batch(worker_pool: Pools, layout: Layout) -> None:
    config = layout_config(layout, data__document_attention="masked")
    for made, num_micro_batches in worker_pool(2).run(masks_of_a_step, config):
        assert made == num_micro_batches > 1
