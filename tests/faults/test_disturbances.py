"""What `python -m tests.faults.disturbances` does: kills and disturbances from outside, each against its promise."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.bench import Bench
from tests.faults.case import Case
from tests.faults.disturbances import CASES
from tests.slurm.cluster import slurm_missing

DAILY = ("all tokens overwritten", "record lost")
"""Cases of a few seconds, of which each has another kind of promise."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def attack(case: Case, bench: Bench, place: Path) -> None:
    if case.needs_slurm and (reason := slurm_missing()) is not None:
        pytest.skip(f"needs Slurm: {reason}")
    case.act(bench, place)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in DAILY], ids=lambda case: case.name)
def test_a_few_faults(case: Case, bench: Bench, tmp_path: Path) -> None:
    attack(case, bench, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in DAILY], ids=lambda case: case.name)
def test_every_other_fault(case: Case, bench: Bench, tmp_path: Path) -> None:
    attack(case, bench, tmp_path)


def test_there_are_enough_of_them() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(case.num_kills for case in CASES) >= 60 and sum(case.num_kills == 0 for case in CASES) >= 40
    assert {case.name for case in CASES} >= set(DAILY)
