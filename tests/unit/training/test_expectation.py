"""The line that compares measured with estimated step time: once, for devices that the planner has constants of."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlra_scale.config import batch_plan, load_config
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import write_cluster_file
from mlra_scale.training.expectation import FIRST, LAST, Expectation


def lines(expectation: Expectation, *seconds: float) -> list[str]:
    """What is said after each of these steps."""
    return [said for each in seconds if (said := expectation.after_step(each)) is not None]


def test_the_estimate_is_compared_once_after_twenty_steps_without_the_first_ones() -> None:
    slow, usual = [50.0] * (FIRST - 1), [1.1] * (LAST - FIRST + 1)
    expectation = Expectation(1.0, "4 x 8 h100")
    assert lines(expectation, *slow, *usual[:-1]) == []
    (said,) = lines(expectation, 1.1, *usual, *usual)
    assert (
        said == "a step takes 1.1 s (median of 15 step(s), without waits for data), 10 % longer than the planner's "
        "estimate of 1 s for 4 x 8 h100"
    )


def test_steps_with_measurements_do_not_count() -> None:
    """Two of three steps measure something, and take three times as long."""
    expectation = Expectation(1.0, "4 x 8 h100")
    steps = [(1.0, True) if step % 3 == 0 else (3.0, False) for step in range(1, LAST + 1)]
    (text,) = [said for step in steps if (said := expectation.after_step(*step)) is not None]
    assert text.startswith("a step takes 1 s (median of 5 step(s), without waits for data), 0 % ")
    busy = Expectation(1.0, "4 x 8 h100")
    assert [busy.after_step(3.0, is_plain=False) for _ in range(2 * LAST)] == [None] * (2 * LAST)


@pytest.mark.parametrize(("measured", "warned"), [(1.24, False), (1.26, True), (0.76, False), (0.74, True)])
def test_more_than_a_quarter_off_is_a_warning(measured: float, warned: bool) -> None:
    (said,) = lines(Expectation(1.0, "1 x 8 h200"), *[measured] * LAST)
    assert said.startswith("warning: ") == warned and said.endswith("slurm/check.sh measures them") == warned
    assert ("shorter than" if measured < 1 else "longer than") in said and "\n" not in said


def test_cpus_are_compared_only_where_they_were_measured(tmp_path: Path) -> None:
    config = load_config("debug", overrides=["train.device=cpu"])
    plan = batch_plan(config, 1)
    unknown = Expectation.of(config, plan, torch.device("cpu"))
    assert unknown.seconds is None and lines(unknown, *[1.0] * 40) == []
    file = tmp_path / "cluster.json"
    write_cluster_file(file, replace(named_cluster("cpu"), name="these cores"), [])
    measured = load_config("debug", overrides=["train.device=cpu", f"cluster.file={file}"])
    expectation = Expectation.of(measured, plan, torch.device("cpu"))
    assert expectation.seconds is not None and expectation.seconds > 0.0
    (said,) = lines(expectation, *[expectation.seconds] * LAST)
    assert said.endswith("for 1 x 1 these cores") and "0 % shorter" in said
