"""Ranks die by SIGKILL in the middle of saves and at random moments; the run goes on as if nothing had happened.

Here every point once, with one rank, and a few random moments. All points with all ranks, and fifty random moments, are
`python -m tests.faults.every_point` and `python -m tests.faults.random_kills`; docs/resume.md has their results.
"""

import random
from pathlib import Path

import pytest

from mlra_scale.checkpoint.failpoints import FAILPOINTS
from tests.faults.checks import Training
from tests.faults.dying import Fault
from tests.faults.every_point import check, faults_of, training_of, undisturbed
from tests.faults.launching import Forked
from tests.faults.random_kills import kill


@pytest.fixture(scope="module")
def training(training_data: Path) -> Training:
    return training_of(training_data, "pipeline2")


@pytest.fixture(scope="module")
def reference(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(training, tmp_path_factory.mktemp("faults") / "undisturbed", Forked)


def faults() -> list[Fault]:
    """One for every point, in the second save, the ranks taking turns where all of them pass it."""
    found = list(faults_of(2, saves=(2,)))
    ranks = {point: [fault for fault in found if fault.point == point] for point in FAILPOINTS}
    return [of_point[place % len(of_point)] for place, of_point in enumerate(ranks.values())]


@pytest.mark.slow_except("mid-file-rank0")
@pytest.mark.parametrize("fault", faults(), ids=lambda fault: f"{fault.point}-rank{fault.rank}")
def test_a_kill_in_a_save_loses_nothing(fault: Fault, training: Training, reference: Path, tmp_path: Path) -> None:
    check(training, fault, tmp_path / "run", reference, Forked)


@pytest.mark.slow
def test_a_kill_in_the_very_first_save_begins_anew(training: Training, reference: Path, tmp_path: Path) -> None:
    assert check(training, Fault("mid-file", 1), tmp_path / "run", reference, Forked) == "went on from step 0"


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(training_data: Path, tmp_path: Path) -> None:
    training = Training(training_data, "zero3-dp2", steps=24, every=3, precision="bf16")
    num_runs, failures = kill(training, 3, tmp_path, Forked, random.Random(4), starting=1.0)
    assert num_runs >= 1 and failures == []
