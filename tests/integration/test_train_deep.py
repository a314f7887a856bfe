"""The 72-layer preset, thin, in the two engines at once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pool import WorkerPool
from tests.support.training_runs import curve, main_on_rank

# As narrow and short as it gets: what counts here is the depth.
THIN = ["model.hidden_size=64", "model.vocab_size=512", "train.sequence_length=16", "train.global_batch_size=4"]
SHORT = [
    "train.steps=3",
    "evaluation.batches=1",
    "optim.warmup_steps=1",
    "train.log_every=1",
    "train.precision=fp32",
    "wandb.mode=disabled",
]
LAYOUTS = {
    "tp2pp2": ["train.micro_batch_size=2", "parallel.tensor=2", "parallel.pipeline=2"],
    "tp2dp2zero3": ["train.micro_batch_size=2", "parallel.tensor=2", 'deepspeed.zero_optimization={"stage": 3}'],
}


@pytest.mark.slow
def test_72_layers_train_alike_in_a_pipeline_and_in_zero_3(
    worker_pool: Callable[[int], WorkerPool], training_data: Path, tmp_path: Path
) -> None:
    for name, layout in LAYOUTS.items():
        base = ["--preset", "gpt2-mlra-72l", "--run-dir", str(tmp_path / name), f"data.path={training_data}"]
        finished = worker_pool(4).run(main_on_rank, (*base, *THIN, *SHORT, *layout), timeout=280)
        assert [result.code for result in finished] == [0, 0, 0, 0]
    pipeline, zero = (tmp_path / name for name in LAYOUTS)
    losses = curve(pipeline, "loss")
    assert list(losses) == [1, 2, 3] and losses[3] < losses[1]
    for name, tolerance in (("loss", 1e-6), ("gradient_norm", 1e-5), ("tev_mean", 1e-6)):
        assert curve(zero, name) == pytest.approx(curve(pipeline, name), rel=tolerance), name
