"""What a worker does in the layout tests: trains a few steps and reports everything that another layout must equal."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mlra_scale.config import Config
from mlra_scale.stability.tev import TevHook, TevStatistics
from tests.support.layouts import Piece, micro_batches, pieces, start


@dataclass
class Record:
    """One rank's account of a run."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    gradients: list[Piece] = field(default_factory=list)
    weights: list[Piece] = field(default_factory=list)
    momenta: list[Piece] = field(default_factory=list)  # exp_avg of all parameters
    buffers: dict[str, np.ndarray] = field(default_factory=dict)  # on rank 0: what carries over beside moments
    tev: TevStatistics | None = None


def allow_fp16_on_cpu() -> None:
    """DeepSpeed refuses fp16 on CPUs without instructions for it; torch computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.half, torch.bfloat16]


def train(
    rank: int, world_size: int, config: Config, steps: int, weights: dict[str, torch.Tensor] | None = None
) -> Record:
    """Trains `steps` steps, and evaluates step 0; gradients are those of the first step, the rest is after the last."""
    from mlra_scale.parallel import Fragment

    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    engine = start(config, world_size, weights)
    record = Record()

    def before_update(proposal: Any) -> bool:
        if not record.gradients:
            record.gradients = pieces(engine, engine.owned_gradients())
        return True

    for step in range(steps):
        batches = micro_batches(engine, step)
        result = engine.train_batch(batches, config.optim.lr, before_update)
        assert result.applied
        record.losses.append(result.loss)
        record.gradient_norms.append(result.gradient_norm)
    # With a batch that was trained on, so that the oracle need not know another one.
    record.validation.append(engine.eval_batch(micro_batches(engine, 0)))
    owned = engine.owned_fragments(with_moments=True)
    record.weights = pieces(engine, owned)
    record.momenta = pieces(engine, [Fragment(f.name, f.start, f.exp_avg) for f in owned if f.exp_avg is not None])
    record.buffers = {name: vector.numpy().copy() for name, vector in engine.buffers().items()}
    hook = TevHook(engine.table, engine.topology, config.tev, config.model.vocab_size)
    record.tev = hook.measure(engine.owned_fragments())
    return record
