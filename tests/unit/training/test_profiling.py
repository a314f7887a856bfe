import json
from pathlib import Path

import torch

from mlra_scale.config import ProfileConfig
from mlra_scale.training.profiling import StepProfiler

CPU = torch.device("cpu")


def run(profiler: StepProfiler, steps: range, last: int | None = None) -> dict[int, str]:
    """Does a matrix product per step and returns {step: text} of the steps that ended a profile."""
    texts = {}
    for step in steps:
        profiler.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        text = profiler.after(step, last or steps[-1])
        if text is not None:
            texts[step] = text
    return texts


def test_the_trace_covers_the_span(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(start=2, stop=4), tmp_path / "profile", CPU, is_active=True)
    texts = run(profiler, range(1, 7))
    assert list(texts) == [3]
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-2-3.json" and str(trace) in texts[3] and "aten::mm" in texts[3]
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::matmul") == 2


def test_a_run_that_ends_inside_the_span_still_leaves_a_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(start=2, stop=9), tmp_path / "profile", CPU, is_active=True)
    assert list(run(profiler, range(1, 4))) == [3]
    assert (tmp_path / "profile" / "steps-2-3.json").exists()


def test_a_run_resumed_behind_the_span_does_not_profile(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(start=2, stop=4), tmp_path / "profile", CPU, is_active=True)
    assert run(profiler, range(4, 8)) == {}


def test_no_span_and_other_ranks_leave_nothing(tmp_path: Path) -> None:
    assert run(StepProfiler(ProfileConfig(), tmp_path / "profile", CPU, is_active=True), range(1, 4)) == {}
    profiler = StepProfiler(ProfileConfig(start=1, stop=2), tmp_path / "profile", CPU, is_active=False)
    assert run(profiler, range(1, 4)) == {}
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    profiler = StepProfiler(ProfileConfig(start=1, stop=2), tmp_path / "profile", CPU, is_active=True)
    texts = run(profiler, range(1, 3))
    assert "aten::mm" in texts[1] and "steps-1-1.json cannot be written (" in texts[1]
