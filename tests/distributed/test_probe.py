"""The probe path shows the oracle's attention logits, for every head and in both engines, and leaves nothing behind."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.model.probe import Heads, observe
from tests.support.layouts import Layout, canonical_weights, global_batch, layout_config, micro_batches, start
from tests.support.oracle import build_reference
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]


def probe(rank: int, world_size: int, config: Any, weights: dict[str, torch.Tensor]) -> list[Any]:
    """Observes one evaluation of two micro-batches: (pass, block, first head, logits) per pass and block held here."""
    engine, plan = start(config, world_size, weights)
    first_head = engine.topology.tensor_rank * config.model.num_heads // engine.topology.tensor
    seen = []

    def see_heads(index: int, heads: Heads) -> None:
        pieces = list(heads.logits())
        assert [(piece.sample, piece.first_head) for piece in pieces] == [(0, 0), (1, 0)]
        seen.append((index, heads.block, first_head, torch.stack([piece.logits_NSS for piece in pieces]).numpy()))

    with observe(engine.module, see_heads, lambda *_: None):
        engine.eval_batch(micro_batches(config, plan, engine.topology.data_rank, 0)[:2])
    assert all(attention.recorder is None for attention in engine.module.modules() if hasattr(attention, "recorder"))
    seen_before = len(seen)
    engine.eval_batch(micro_batches(config, plan, engine.topology.data_rank, 0)[:2])
    assert len(seen) == seen_before
    return seen


@pytest.mark.slow_except("across-tp2pp1dp1 zero0", "masked-tp1pp2dp1 zero0", "masked-tp1pp1dp2 zero3")
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(data=2, stage=3)], ids=str)
@pytest.mark.parametrize("documents", ["across", "masked"])
def test_logits_equal_the_oracles(worker_pool: Pools, layout: Layout, documents: str) -> None:
    config = layout_config(layout, data__document_attention=documents)
    weights = canonical_weights(config.model)
    ranks = worker_pool(layout.world_size).run(probe, config, weights)
    batch = global_batch(config, 0)
    ids = batch.documents_BS if documents == "masked" else None
    with torch.no_grad():
        expected = build_reference(config, weights).attention_logits(batch.tokens_BS, batch.positions_BS, ids)
    found: set[tuple[int, int, int]] = set()
    for rank, seen in enumerate(ranks):
        data_rank = rank // layout.tensor % layout.data
        for index, block, first_head, logits in seen:
            first_row = (index * layout.data + data_rank) * 2
            heads = slice(first_head, first_head + logits.shape[1])
            reference = expected[block][first_row : first_row + 2, heads].numpy()
            allowed = np.isfinite(reference)
            np.testing.assert_array_equal(np.isfinite(logits), allowed)
            np.testing.assert_allclose(logits[allowed], reference[allowed], rtol=1e-4, atol=1e-5)
            found.update((first_row, block, head) for head in range(heads.start, heads.stop))
    rows = range(0, 4 * layout.data, 2)
    assert found == {(row, block, head) for row in rows for block in range(4) for head in range(4)}
