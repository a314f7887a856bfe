"""What happens beside training steps, traced: TEV, statistics, QK-clip, activations, snapshot, evaluation, generation.

The real parts run. Two functions that only calculate on the host with numbers that nobody knows here are answered:
TEV's `combine`, which checks that every row was counted, and nothing else.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tests.support.device.expected import NEW_TOKENS

if TYPE_CHECKING:
    from tests.support.device.traced import TracedRank


def trace_measurements(rank: TracedRank) -> dict[str, Any]:
    """Runs everything once, each as a phase of its own.

    Returns:
        planned_snapshot: Bytes of host memory that the planner counts for a checkpoint's copy.
    """
    from mlra_scale.evaluation.perplexity import Window
    from mlra_scale.evaluation.tasks import Tasks
    from mlra_scale.parallel import StepResult
    from mlra_scale.planning.memory import rank_memory
    from mlra_scale.stability import tev
    from mlra_scale.stability.gradients import GradientStatistics
    from mlra_scale.stability.qk_clip import QkClip
    from mlra_scale.stability.watcher import Step
    from mlra_scale.training.watch.passes import DataPasses
    from mlra_scale.training.watch.text_tasks import TextTasks

    statistics = tev.TevStatistics(1.0, 1.0, {}, 1.0, 1.0, 1, [], [])
    tev.combine = lambda *_: statistics
    engine, plan, config = rank.engine, rank.plan, rank.config
    validation: Any = SimpleNamespace(batch=lambda first, size: rank.batches()[0])
    gradients = GradientStatistics(engine, config)
    texts = TextTasks(engine, plan, Tasks(), lambda: None, lambda: None, print, 20.0)
    passes = DataPasses(engine, config, plan, validation, lambda read: read(), lambda: None, texts)
    batches, phase = rank.batches(), rank.trace.phase
    step = Step(1, True, 0, batches, 1e-4)

    def approve(proposal: Any) -> bool:
        with phase("gradient statistics"):
            return gradients.before_update(proposal)

    with phase("noise scale"):
        gradients.before_step(step)
    with phase("measured step"):
        result: StepResult = engine.train_batch(batches, 1e-4, approve, lambda: False)
    with phase("update statistics"):
        gradients.after_step(step, result)
    with phase("TEV"):
        tev.TevWatcher(engine, config).measure(1)
    with phase("QK-clip"):
        QkClip(engine, config.model, config.qk_clip, plan).apply(batches, 0)
        _scale_some_rows(rank)
    with phase("activations"):
        passes.run(["activations"], {})
    with phase("evaluation"):
        engine.eval_batch(batches)
    with phase("texts"):
        texts.score([Window([1, 2, 3], 2)])
    _snapshot(rank)
    _generate(rank)
    return {"planned_snapshot": rank_memory(config, plan, rank.topology.pipeline_rank).snapshot}


def _scale_some_rows(rank: TracedRank) -> None:
    """What QK-clip does where a head is above the threshold, in the first two blocks."""
    from mlra_scale.stability.qk_clip import row_factors

    model = rank.config.model
    rank.engine.scale_rows(row_factors(torch.full((2, model.num_heads), 0.5).double(), model, rank.engine.table))


def _generate(rank: TracedRank) -> None:
    """NEW_TOKENS after each of two prompts, by a small model as exports have it. FakeTensors have no inference mode."""
    from transformers import GenerationMixin

    from mlra_scale.evaluation.generation import GenerationOptions, _new_tokens
    from mlra_scale.evaluation.models import OpenedModel
    from mlra_scale.shipped.modeling_mlra import MlraConfig, MlraForCausalLM

    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "attention_rank": 16}
    module = MlraForCausalLM(MlraConfig(vocab_size=64, max_position_embeddings=16, **shape)).to("cuda").eval()
    opened = OpenedModel(module, Path(), 64, 16, None)

    def without_gradients(is_inference: bool = True) -> AbstractContextManager[None]:
        return torch.no_grad() if is_inference else nullcontext()

    is_unfinished, number = GenerationMixin._has_unfinished_sequences, count()

    def is_unfinished_until_the_end(*arguments: Any, **options: Any) -> bool:
        """Nobody knows here that the longest text is reached; the read for it counts."""
        return is_unfinished(*arguments, **options) and next(number) < NEW_TOKENS

    with (
        mock.patch.object(torch, "inference_mode", without_gradients),
        mock.patch.object(GenerationMixin, "_has_unfinished_sequences", is_unfinished_until_the_end),
        rank.trace.phase("generation"),
    ):
        _new_tokens(opened, [[1, 2, 3], [4]], 0, GenerationOptions(max_new_tokens=NEW_TOKENS, is_greedy=True))


def _snapshot(rank: TracedRank) -> None:
    """The part of an asynchronous save for which training waits, and what the writer then waits for."""
    from mlra_scale.checkpoint.copies import copied_parameters
    from mlra_scale.checkpoint.saving import HostMemory, take_snapshot

    with rank.trace.phase("agreement of a save"):
        copied = copied_parameters(rank.engine)
        rank.engine.buffers()
        rank.engine.training_state()
    with rank.trace.phase("snapshot"):
        snapshot = take_snapshot(rank.engine, copied, HostMemory())
    with rank.trace.phase("writing"):
        snapshot.read()
