"""A signal to one rank stops all of them at the same micro-batch, wherever they are, and nothing is lost."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mlra_scale.training.exit_codes import ExitCode
from tests.support.pool import WorkerPool
from tests.support.training_runs import Finished, Start, base_command, curve, events, main_on_rank, metrics

MEASURING = ["train.steps=6", "evaluation.every=2", "evaluation.batches=2", "activations.every=3", "checkpoint.every=0"]
LAST = "checkpoints/step-00000004"
LAYOUTS = {
    "zero1": ["parallel.tensor=2"],
    "pipeline2": ["parallel.pipeline=2"],
    "zero3-dp2": ["--ds-config", "ds_configs/zero3.json"],
}


def signalled_main(
    rank: int, world_size: int, arguments: tuple[str, ...], where: str, nth: int, number: signal.Signals
) -> tuple[Finished, int]:
    """Runs the command line on a rank; the last rank gets a signal at the n-th time that a function asks for stops.

    Returns:
        How it ended, and how often that function had asked by then.
    """
    from mlra_scale.training.loop import trainer

    raise_if_stopped, num_calls = trainer.raise_if_stopped, 0

    def callers(frame: FrameType | None) -> set[str]:
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        return names

    def signal_and_raise(*arguments: Any) -> None:
        nonlocal num_calls
        if where in callers(sys._getframe()):
            num_calls += 1
            if num_calls == nth and rank == world_size - 1:
                os.kill(os.getpid(), number)
        raise_if_stopped(*arguments)

    trainer.raise_if_stopped = signal_and_raise  # type: ignore[assignment]
    try:
        return main_on_rank(rank, world_size, arguments), num_calls
    finally:
        trainer.raise_if_stopped = raise_if_stopped


@pytest.fixture
def interrupted(
    tmp_path: Path, training_data: Path, worker_pool: Callable[[int], WorkerPool]
) -> Callable[..., Finished]:
    def run(name: str, where: str, nth: int, *arguments: str, number: signal.Signals = signal.SIGTERM) -> Finished:
        command = base_command(tmp_path / name, training_data, *arguments)
        results = worker_pool(2).run(signalled_main, tuple(command), where, nth, number)
        for finished, num_calls in results:
            assert finished.code == ExitCode.PREEMPTED, finished.stderr[-4000:]
            assert num_calls == nth, "heard at this very micro-batch, on every rank"
        first: Finished = results[0][0]
        return first

    return run


def shown(run: Path) -> list[dict[str, object]]:
    """The record without what is of the clock and of the machine."""
    of_machine = ("seconds", "tokens_per_second", "memory_gib", "measuring_seconds", "mfu")
    return [{key: value for key, value in item.items() if key not in of_machine} for item in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_stop_leaves_out_is_made_up_for(
    layout: str, tmp_path: Path, start: Start, interrupted: Callable[..., Finished]
) -> None:
    """Signals in an evaluation, an activation probe, a noise estimate and the last evaluation: one run, five starts."""
    arguments = [*MEASURING, *LAYOUTS[layout], "gradients.noise_every=3"]
    start("whole", *arguments, num_processes=2)
    # In each: steps of a pipeline's schedule, or micro-batches, in one evaluation.
    num_heard = {"zero1": 8, "pipeline2": 10, "zero3-dp2": 4}[layout]
    for where, nth, step, number in (
        ("_measure_validation", num_heard + 2, 2, signal.SIGTERM),  # of step 0, which is done, and in that of step 2
        ("gradient_norm", 2, 2, signal.SIGINT),  # before step 3: nothing was done since
        ("_measure_activations", 1, 3, signal.SIGHUP),
        ("_measure_validation", num_heard + 2, 6, signal.SIGUSR1),
    ):
        finished = interrupted("parts", where, nth, *arguments, "--resume", "auto", number=number)
        event = events(tmp_path / "parts")[-1]
        assert (event["event"], event["step"]) == ("preempted", step)
        folder = tmp_path / "parts" / "checkpoints" / f"step-{step:08d}"
        assert event["checkpoint"] == str(folder) and (folder / "manifest.json").is_file()
        assert f"stopped: after step {step}, as a signal asked: the checkpoint {folder} is complete" in finished.stderr
    start("parts", *arguments, "--resume", "auto", num_processes=2)
    assert shown(tmp_path / "parts") == shown(tmp_path / "whole")
    start("parts", *arguments, "--resume", "auto", num_processes=2)
    assert events(tmp_path / "parts")[-1]["reason"] == "already at train.steps=6", "it was made up for once"


@pytest.mark.slow
def test_a_stop_before_the_first_step_says_that_there_is_no_checkpoint(
    tmp_path: Path, start: Start, interrupted: Callable[..., Finished]
) -> None:
    finished = interrupted("run", "_measure_validation", 2, *MEASURING)
    assert re.search("before the first step, as a signal asked: there is no checkpoint yet", finished.stderr)
    assert not (tmp_path / "run" / "checkpoints").exists()
    start("run", *MEASURING, "--resume", "auto", num_processes=2)
    assert list(curve(tmp_path / "run", "validation_loss")) == [0, 2, 4, 6]


@pytest.mark.slow
def test_a_stop_while_texts_are_scored_is_made_up_for(
    tmp_path: Path, start: Start, interrupted: Callable[..., Finished]
) -> None:
    (tmp_path / "text.txt").write_text("A text of one window, which is one micro-batch.")
    arguments = ["train.steps=4", "checkpoint.every=2", f"evaluation.tasks=[{tmp_path}/text.txt]"]
    start("whole", *arguments, num_processes=2)
    # The second start first scores the text for step 2.
    for nth, step in ((1, 2), (2, 4)):
        interrupted("parts", "_measure_tasks", nth, *arguments, "--resume", "auto")
        event = events(tmp_path / "parts")[-1]
        assert (event["event"], event["step"]) == ("preempted", step)
    start("parts", *arguments, "--resume", "auto", num_processes=2)
    assert shown(tmp_path / "parts") == shown(tmp_path / "whole")
    states = [json.loads((tmp_path / run / LAST / "state.json").read_text()) for run in ("parts", "whole")]
    for name in ("validation_loss", "tasks"):
        assert states[0][name] == states[1][name] is not None, "a model card has them too"
