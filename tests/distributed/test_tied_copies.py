"""Both copies of the tied embedding stay equal bit by bit, wherever ZeRO cuts and whatever the order of a reduction.

The vocabulary is large, as it is in practice, so that the embedding does not lie in the first piece of its stage; and
three data ranks are added up, since a sum of two has no order.
"""

import pytest
import torch

from mlra_scale.config import Config
from tests.support.layouts import Layout, canonical_weights, layout_config, micro_batches, start
from tests.support.pool import Pools

Pieces = list[tuple[int, list[torch.Tensor]]]


def embedding_after(rank: int, world_size: int, config: Config, steps: int) -> tuple[list[float], Pieces]:
    """Losses, and this rank's pieces of the embedding and of its moments after some steps."""
    engine = start(config, world_size, canonical_weights(config.model))
    losses = []
    for step in range(steps):
        batches = micro_batches(engine, step)
        losses.append(engine.train_batch(batches, config.optim.lr).loss)
    held = [f for f in engine.held_fragments(with_moments=True) if f.name == "embedding.weight"]
    return losses, [(f.start, [t.clone() for t in (f.values, f.exp_avg, f.exp_avg_sq) if t is not None]) for f in held]


def whole(pieces: list[Pieces]) -> torch.Tensor:
    """Weight and moments of a stage, put together from those of its data ranks."""
    in_order = sorted((piece for of_rank in pieces for piece in of_rank), key=lambda piece: piece[0])
    return torch.cat([torch.stack(tensors) for _, tensors in in_order], dim=1)


@pytest.mark.slow_except("2-1-fp32")
@pytest.mark.parametrize(
    ("data", "stage", "precision"), [(3, 0, "fp32"), (2, 1, "fp32"), (3, 1, "fp32"), (3, 1, "bf16"), (3, 0, "bf16")]
)
def test_tied_copies_do_not_drift_apart(worker_pool: Pools, data: int, stage: int, precision: str) -> None:
    more = {"model__vocab_size": 2002, "model__num_layers": 2, "train__global_batch_size": 12}
    config = layout_config(Layout(pipeline=2, data=data, stage=stage), train__precision=precision, **more)
    ranks = worker_pool(2 * data).run(embedding_after, config, 4)
    pieces = [found for _, found in ranks]
    if (stage, precision) == (0, "fp32"):  # everything on every rank
        assert all(torch.equal(whole([of_rank]), whole(pieces[:1])) for of_rank in pieces)
    else:
        first, last = whole(pieces[:data]), whole(pieces[data:])
        assert first.shape == (3, 2016 * 32) and torch.equal(first, last)
    # The sum is still the gradient of the batch: one process gives the same losses.
    alone = layout_config(Layout(), train__precision=precision, **more)
    ((expected, _),) = worker_pool(1).run(embedding_after, alone, 4)
    assert ranks[0][0] == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 2**-9)
