"""The figure of one run: which events have a row."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

from mlra_scale.study.report.records import RunRecord
from mlra_scale.study.report.run_figures import ACCURACY, TEXTS, curves_of, event_rows, time_figure


def test_every_text_and_accuracy_has_a_curve_of_its_own(tmp_path: Path) -> None:
    texts = {"a": {"token_perplexity": 30.0}, "b.c": {"token_perplexity": 50.0}}
    harness = {"choose": {"acc": 0.5, "perplexity": 12.0}}
    steps = [{"step": step, "loss": 5.0} for step in range(1, 4)]
    run = RunRecord(tmp_path, metrics=[*steps, {"step": 4, "tasks": texts, "harness": harness}])
    assert [keys for title, _, keys in curves_of(run) if title == TEXTS] == [
        ("tasks", "a", "token_perplexity"),
        ("tasks", "b.c", "token_perplexity"),
    ]
    assert curves_of(run)[-1] == (ACCURACY, "choose: acc", ("harness", "choose", "acc")), "a perplexity is no share"
    with_texts, missing = time_figure(run)
    without, said = time_figure(RunRecord(tmp_path, metrics=[*steps, {"step": 4}]))
    assert with_texts != without and f"{TEXTS}: not measured (needs evaluation.tasks)." in said
    assert not [sentence for sentence in missing if sentence.startswith(TEXTS)]


def run_with(tmp_path: Path, **of_return: object) -> RunRecord:
    """A run of ten steps that the guard took back to step 4 from step 8."""
    metrics = [{"step": step, "loss": 5.0 - 0.1 * step} for step in range(1, 11)]
    return RunRecord(
        tmp_path, metrics=metrics, events=[{"event": "guard_rollback", "step": 8, "to_step": 4, **of_return}]
    )


def test_a_return_that_lowers_the_rate_is_drawn_where_lowered_rates_are(tmp_path: Path) -> None:
    plain, lowered = run_with(tmp_path, until=None), run_with(tmp_path, until=9)
    assert event_rows(plain) == ["guard_rollback"]
    assert event_rows(lowered) == ["guard_lower_rate", "guard_rollback"]
    first, second = (time_figure(run)[0] for run in (lowered, run_with(tmp_path, until=6)))
    assert first is not None and first != second, "until when it lasts is in the figure"
