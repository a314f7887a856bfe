"""What watches the process: a profile of some steps, and garbage collections at the same steps on all ranks."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlra_scale import train
from mlra_scale.config import Named, ProfileConfig, load_config
from mlra_scale.stability.watcher import Step
from mlra_scale.training.interruption import Interruption, Watchdog
from mlra_scale.training.loop import trainer
from mlra_scale.training.start import request
from mlra_scale.training.watch.step_watchers import GarbageCollection, StepProfiler

CPU = torch.device("cpu")


RESULT: Any = None


def profiler_of(
    folder: Path, last: int, span: tuple[int, int] | None = None, is_main: bool = True
) -> tuple[StepProfiler, list[str]]:
    """A profiler, and what it prints."""
    config, printed = ProfileConfig() if span is None else ProfileConfig(start=span[0], stop=span[1]), list[str]()
    return StepProfiler(config, folder / "profile", CPU, last, printed.append if is_main else None), printed


def run(profiler_and_printed: tuple[StepProfiler, list[str]], steps: range) -> dict[int, str]:
    """Does a matrix product per step and returns {step: text} of the steps that ended a profile."""
    texts, (profiler, printed) = {}, profiler_and_printed
    for number in steps:
        step = Step(number, False, 0)
        profiler.before_step(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.after_step(step, RESULT)
        if printed:
            texts[number] = printed.pop()
    return texts


def test_the_trace_covers_the_span(tmp_path: Path) -> None:
    profiler = profiler_of(tmp_path, 6, (2, 4))
    texts = run(profiler, range(1, 7))
    assert list(texts) == [3]
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-2-3.json" and str(trace) in texts[3] and "aten::mm" in texts[3]
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::matmul") == 2


def test_no_span_and_other_ranks_leave_nothing_and_a_run_that_ends_inside_the_span_a_trace(tmp_path: Path) -> None:
    for profiler in (profiler_of(tmp_path, 3), profiler_of(tmp_path, 3, (1, 2), is_main=False)):
        assert run(profiler, range(1, 4)) == {}
    assert run(profiler_of(tmp_path, 6, (2, 4)), range(4, 8)) == {}, "resumed behind the span"
    assert not (tmp_path / "profile").exists()
    assert list(run(profiler_of(tmp_path, 3, (2, 9)), range(1, 4))) == [3]
    assert (tmp_path / "profile" / "steps-2-3.json").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    profiler = profiler_of(tmp_path, 2, (1, 2))
    texts = run(profiler, range(1, 3))
    assert "aten::mm" in texts[1] and "steps-1-1.json cannot be written (" in texts[1]


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """Generations of the collections that begin."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.enable()


def make_objects() -> None:
    """More than those after which Python collects by itself."""
    kept = [[index] for index in range(200_000)]
    assert kept


def test_it_runs_every_so_many_steps_and_at_no_other_time(collected: list[int]) -> None:
    with GarbageCollection(3) as garbage:
        del collected[:]
        steps = []
        for step in range(1, 10):
            make_objects()
            garbage.after_step(Step(step, False, 0), RESULT)
            if collected:
                steps.append(step)
                assert collected == [2], "a whole collection"
                del collected[:]
        assert steps == [3, 6, 9]
        assert gc.get_freeze_count() > 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_leaves_it_to_python(collected: list[int]) -> None:
    with GarbageCollection(0) as garbage:
        assert gc.isenabled()
        make_objects()
        garbage.after_step(Step(1, False, 0), RESULT)
    assert collected


def test_a_program_that_imports_without_the_collector_trains_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: Any = SimpleNamespace(config=load_config("debug"), directory=None, is_done=False)
    asked: Any = SimpleNamespace(config=resolved.config, named=Named())
    seen = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(request, "resolve_run", lambda asked: resolved)
    monkeypatch.setattr(trainer, "launch", lambda *arguments: seen.append((gc.isenabled(), gc.get_freeze_count() > 0)))
    gc.disable()
    try:
        train._train(asked, 1, Watchdog(), Interruption())
    finally:
        gc.enable()
        gc.unfreeze()
    assert seen == [(True, True)]
