"""The probe path returns the oracle's attention logits and entropies, for every head, in both engines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.model.probe import record_attention
from tests.support.layouts import Layout, canonical_weights, global_batch, layout_config, micro_batches, start
from tests.support.oracle import build_reference
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]


def probe(rank: int, world_size: int, config: Any, weights: dict[str, torch.Tensor]) -> list[Any]:
    """Records one evaluation of the first micro-batch: (block, first head, logits, entropies) per block held here."""
    engine, plan = start(config, world_size, weights)
    batches = micro_batches(config, plan, engine.topology.data_rank, 0)[:1]
    with record_attention(engine.module) as records:
        engine.eval_batch(batches)
    assert all(attention.recorder is None for attention in engine.module.modules() if hasattr(attention, "recorder"))
    first_head = engine.topology.tensor_rank * config.model.num_heads // engine.topology.tensor
    return [(r.block, first_head, r.logits_BNSS.numpy(), r.entropy_BNS.numpy()) for r in records]


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(data=2, stage=3)], ids=str)
@pytest.mark.parametrize("documents", ["across", "masked"])
def test_logits_and_entropies_equal_the_oracles(worker_pool: Pools, layout: Layout, documents: str) -> None:
    config = layout_config(layout, data__document_attention=documents)
    weights = canonical_weights(config.model)
    ranks = worker_pool(layout.world_size).run(probe, config, weights)
    batch = global_batch(config, 0)
    ids = batch.documents_BS if documents == "masked" else None
    with torch.no_grad():
        expected = build_reference(config, weights).attention_logits(batch.tokens_BS, batch.positions_BS, ids)
    seen: set[tuple[int, int]] = set()
    for rank, records in enumerate(ranks):
        data_rank = rank // layout.tensor % layout.data
        rows = slice(data_rank * 2, data_rank * 2 + 2)
        for block, first_head, logits, entropy in records:
            heads = slice(first_head, first_head + logits.shape[1])
            reference = expected[block][rows, heads].numpy()
            allowed = np.isfinite(reference)
            np.testing.assert_array_equal(np.isfinite(logits), allowed)
            np.testing.assert_allclose(logits[allowed], reference[allowed], rtol=1e-4, atol=1e-5)
            weights_of = torch.from_numpy(reference).softmax(-1)
            surprise = torch.where(weights_of > 0, -weights_of.log(), torch.zeros(()).double())
            np.testing.assert_allclose(entropy, (weights_of * surprise).sum(-1).numpy(), rtol=1e-4, atol=1e-5)
            seen.update((block, head) for head in range(heads.start, heads.stop))
    assert seen == {(block, head) for block in range(4) for head in range(4)}
