"""The perplexity of texts (`evaluation.tasks`) of the model that trains, shared among the data ranks.

Shape suffixes: B samples of a micro-batch, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mlra_scale.config import BatchPlan
from mlra_scale.data import Batch
from mlra_scale.evaluation.perplexity import Window, perplexity_of
from mlra_scale.evaluation.tasks import TaskText
from mlra_scale.model.loss import NO_TARGET
from mlra_scale.training.loop.batches import first_samples

if TYPE_CHECKING:
    from mlra_scale.parallel import Engine


class TextTasks:
    """Scores the windows of texts by passes of the engine, in any layout; its methods are collective.

    A pass takes as many windows as a training step takes samples, dealt to the data ranks as samples are. A window is
    a sample of `train.sequence_length` positions, of which those without a scored token have no target.

    Args:
        engine: The model.
        plan: The batch plan.
        texts: The same on every rank.
        before_pass: Called before every pass.
        hear_stop: See passes.raise_if_stopped.
    """

    def __init__(
        self,
        engine: Engine,
        plan: BatchPlan,
        texts: Sequence[TaskText],
        before_pass: Callable[[], None],
        hear_stop: Callable[[], None],
    ) -> None:
        self._engine, self._plan, self.texts = engine, plan, texts
        self._before_pass, self._hear_stop = before_pass, hear_stop

    def measure(self) -> dict[str, Any]:
        """Returns the figures of every text by its name: the entry `tasks` of the record."""
        return {text.name: perplexity_of(text.counts, self._score(text)).figures() for text in self.texts}

    def _score(self, text: TaskText) -> float:
        """Returns the sum of -ln p over the scored tokens of a text."""
        plan, total = self._plan, 0.0
        for first in range(0, len(text.windows), plan.global_batch_size):
            self._before_pass()
            starts = first_samples(plan, self._engine.topology.data_rank, first)
            # At the end of a text, micro-batches that are empty on all ranks are left out.
            per_round = plan.micro_batch_size * plan.data
            rounds = -(-min(plan.global_batch_size, len(text.windows) - first) // per_round)
            batches = [self._batch(text.windows[start : start + plan.micro_batch_size]) for start in starts[:rounds]]
            positions = rounds * per_round * plan.sequence_length
            total += self._engine.eval_batch(batches, self._hear_stop) * positions
        return total

    def _batch(self, windows: Sequence[Window]) -> Batch:
        """Returns a micro-batch of windows, filled up with samples without targets."""
        size, length = self._plan.micro_batch_size, self._plan.sequence_length
        tokens_BS = torch.zeros(size, length, dtype=torch.int64)
        targets_BS = torch.full((size, length), NO_TARGET, dtype=torch.int64)
        for row, window in enumerate(windows):
            values, stop = torch.tensor(window.tokens), len(window.tokens) - 1
            tokens_BS[row, :stop] = values[:-1]
            targets_BS[row, stop - window.num_new : stop] = values[stop + 1 - window.num_new :]
        positions_BS = torch.arange(length).expand(size, length).contiguous()
        return Batch(tokens_BS, targets_BS, positions_BS, torch.zeros_like(tokens_BS), torch.arange(size))
