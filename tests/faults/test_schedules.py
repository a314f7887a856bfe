"""Every rank dies at every point of the first and second save, and at random moments, under torchrun.

The runs are those of `python -m tests.faults.every_point` and `python -m tests.faults.random_kills`.
"""

import random
from pathlib import Path

import pytest

from tests.faults.checks import LAYOUTS, Training
from tests.faults.dying import Fault
from tests.faults.every_point import check, faults_of, training_of, undisturbed
from tests.faults.launching import Torchrun
from tests.faults.random_kills import EVERY, STEPS, kill

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

SCHEDULES = [("pipeline2", (1, 2)), ("zero3-dp2", (1, 2)), ("tp2pp2", (2,))]
"""Layouts, and the saves in which their ranks die."""
FAULTS = [(layout, fault) for layout, saves in SCHEDULES for fault in faults_of(LAYOUTS[layout][0], saves)]


@pytest.fixture(scope="module")
def references(training_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The undisturbed run of each layout."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        layout: undisturbed(training_of(training_data, layout), folder / layout, Torchrun) for layout, _ in SCHEDULES
    }


@pytest.mark.parametrize(
    ("layout", "fault"), FAULTS, ids=[f"{name}-{fault.point}-{fault.rank}-{fault.occurrence}" for name, fault in FAULTS]
)
def test_every_rank_dies_at_every_point(
    layout: str, fault: Fault, training_data: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    check(training_of(training_data, layout), fault, tmp_path / "run", references[layout], Torchrun)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("layout", "precision", "num_kills"),
    [
        ("pipeline2", "fp32", 25),
        ("zero3-dp2", "fp32", 25),
        ("tp2pp2", "bf16", 5),
        ("zero3-tp2dp2", "bf16", 5),
    ],
)
def test_ranks_die_at_random_moments(
    layout: str, precision: str, num_kills: int, training_data: Path, tmp_path: Path
) -> None:
    training = Training(training_data, layout, STEPS, EVERY, precision=precision)
    _, failures = kill(training, num_kills, tmp_path, Torchrun, random.Random(7))
    assert failures == []
