"""Texts are shared among data ranks: together these score every window once, in any layout of a batch."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlra_scale.config import BatchPlan, batch_plan, load_config
from mlra_scale.evaluation.perplexity import windows
from mlra_scale.evaluation.tasks import TaskText
from mlra_scale.model.loss import NO_TARGET
from mlra_scale.training.watch.text_tasks import TextTasks

VOCABULARY, LENGTH = 50, 8


class DataRanks:
    """An engine of several data ranks, of which each is run in turn; token t follows s with a made-up probability."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.passes = plan, list[list[int]]()

    def scored(self, text: TaskText) -> float:
        """Runs all data ranks and returns the sum of their figures."""
        total, passes = 0.0, set()
        for data_rank in range(self.plan.data):
            engine: Any = SimpleNamespace(topology=SimpleNamespace(data_rank=data_rank), eval_batch=self.eval_batch)
            self.passes.append([])
            tasks = TextTasks(engine, self.plan, [text], lambda: None, lambda: None)
            total += tasks.measure()[text.name]["negative_log_likelihood"]
            passes.add(tuple(self.passes[-1]))
        assert len(passes) == 1, "all ranks pass equally many micro-batches"
        return total

    def eval_batch(self, batches: list[Any], between: Any) -> float:
        """The mean over all positions of all data ranks, of which the others have no target here."""
        self.passes[-1].append(len(batches))
        assert all(batch.tokens_BS.shape == (self.plan.micro_batch_size, LENGTH) for batch in batches)
        total = sum(
            nats(int(token), int(target), place)
            for batch in batches
            for row, targets in zip(batch.tokens_BS, batch.targets_BS, strict=True)
            for place, (token, target) in enumerate(zip(row, targets, strict=True))
            if target != NO_TARGET
        )
        return total / (len(batches) * self.plan.micro_batch_size * self.plan.data * LENGTH)


def nats(token: int, target: int, place: int) -> float:
    return 1.0 + math.sin(token + 7 * target) + 0.01 * place


def text_of(*lengths: int) -> TaskText:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    found = [window for tokens in documents for window in windows([tokens], LENGTH, LENGTH // 2)]
    scored = sum(window.num_new for window in found)
    return TaskText("text", found, Counter(documents=len(lengths), scored=scored, words=1, bytes=1))


@pytest.mark.parametrize("lengths", [(2,), (40,), (3, 9, 30, 5, 8), (8,) * 17], ids=str)
@pytest.mark.parametrize(("ranks", "micro", "batch"), [(1, 1, 1), (1, 4, 8), (2, 2, 8), (4, 1, 4), (3, 2, 12)])
def test_every_window_counts_once(ranks: int, micro: int, batch: int, lengths: tuple[int, ...]) -> None:
    sizes = [f"train.micro_batch_size={micro}", f"train.global_batch_size={batch}"]
    config = load_config("debug", overrides=[f"train.sequence_length={LENGTH}", *sizes])
    text = text_of(*lengths)
    expected = sum(
        nats(window.tokens[place], window.tokens[place + 1], place)
        for window in text.windows
        for place in range(len(window.tokens) - 1 - window.num_new, len(window.tokens) - 1)
    )
    data_ranks = DataRanks(batch_plan(config, ranks))
    assert data_ranks.scored(text) == pytest.approx(expected, rel=1e-12)
    rounds = -(-len(text.windows) // (micro * ranks))
    assert sum(data_ranks.passes[0]) == rounds, "no pass without a window"


def test_before_every_pass_something_is_called_and_a_stop_may_end_it() -> None:
    config = load_config("debug", overrides=[f"train.sequence_length={LENGTH}", "train.global_batch_size=4"])
    plan = batch_plan(config, 1)
    calls: list[Any] = []

    def stop() -> None:
        raise KeyboardInterrupt

    def eval_batch(batches: list[Any], between: Any) -> float:
        calls.append(between)
        between()
        return 0.0

    engine: Any = SimpleNamespace(topology=SimpleNamespace(data_rank=0), eval_batch=eval_batch)
    tasks = TextTasks(engine, plan, [text_of(40)], lambda: calls.append("pass"), stop)
    with pytest.raises(KeyboardInterrupt):
        tasks.measure()
    assert calls == ["pass", stop]
