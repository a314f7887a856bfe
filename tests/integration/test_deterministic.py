"""train.deterministic and train.garbage_every, through the command line, on all ranks of both engines."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.pool import WorkerPool
from tests.support.training_runs import base_command, curve, main_on_rank

LAYOUTS = {"tensor2": ["parallel.tensor=2"], "pipeline2-bf16": ["parallel.pipeline=2", "train.precision=bf16"]}


def watched_main(rank: int, world_size: int, arguments: tuple[str, ...]) -> tuple[int, str, bool, list[bool]]:
    """Runs the command line on a rank.

    Returns:
        The exit code, what was printed as an error, whether nondeterministic operations are refused at the end, and of
        each whole collection of garbage during the run whether it was one that Python had begun by itself.
    """
    collections: list[bool] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            collections.append(gc.isenabled())

    gc.callbacks.append(note)
    try:
        result = main_on_rank(rank, world_size, arguments)
        return result.code, result.stderr, torch.are_deterministic_algorithms_enabled(), collections
    finally:
        gc.callbacks.remove(note)
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_deterministic_run_collects_garbage_in_step(
    tmp_path: Path, training_data: Path, worker_pool: Callable[[int], WorkerPool], layout: str
) -> None:
    curves = {}
    for is_deterministic in ("true", "false"):
        run = tmp_path / is_deterministic
        command = base_command(
            run, training_data, f"train.deterministic={is_deterministic}", "train.steps=5", *LAYOUTS[layout]
        )
        ranks = worker_pool(2).run(watched_main, (*command, "train.garbage_every=2", "train.log_every=1"))
        for code, errors, is_refused, collections in ranks:
            assert code == 0, errors[-3000:]
            assert is_refused == (is_deterministic == "true")
            assert collections.count(False) == 3, "at the start, and after steps 2 and 4"
        curves[is_deterministic] = curve(run, "loss")
    # On CPUs the operations of a step are deterministic as they are.
    assert len(curves["true"]) == 5 and curves["true"] == curves["false"]
