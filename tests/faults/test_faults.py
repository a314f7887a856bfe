"""Kills and disturbances from outside, each against its promise: ranks, disks, signals, damaged files, Slurm jobs."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from mlra_scale.checkpoint.failpoints import FAILPOINTS
from tests.faults.__main__ import missing
from tests.faults.bench import Bench
from tests.faults.case import EIO, FLIP, FULL, KILL, OTHER, REPLACED, TRUNCATION, Case
from tests.faults.cases import CASES
from tests.faults.saves import in_turn
from tests.support.training_runs import ROOT

TIERS = {"": (), "slow": (pytest.mark.slow,), "nightly": (pytest.mark.nightly, pytest.mark.timeout(7200))}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.mark.parametrize("case", [pytest.param(case, marks=TIERS[case.tier], id=case.name) for case in CASES])
def test_a_promise_is_kept(case: Case, bench: Bench, tmp_path: Path) -> None:
    for reason in missing([case]).values():
        pytest.skip(f"needs {'Slurm: ' if case.needs == 'slurm' else ''}{reason}")
    case.act(bench, tmp_path)


def test_there_are_enough_of_them() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    kinds = Counter[str]()
    for case in CASES:
        kinds.update(case.faults)
    assert kinds.total() >= 500 and kinds[KILL] >= 200
    assert all(kinds[kind] >= 30 for kind in (FLIP, TRUNCATION, REPLACED, FULL, EIO, OTHER)), kinds
    assert [trigger.event for trigger in in_turn()] == [f"point {point}" for point in FAILPOINTS]


def test_triggers_are_calls_of_functions_that_exist() -> None:
    """A pattern that a renamed function no longer matches would be noticed in the nightly tests only."""
    texts = [file.read_text() for file in Path(__file__).parent.glob("*.py")]
    calls = {call for text in texts for call in re.findall(r'"call (mlra_scale/\S+\.py) ([^"]+)"', text)}
    assert len(calls) > 20
    for file, pattern in calls:
        names = list(qualified(ast.parse((ROOT / file).read_text())))
        assert any(fnmatchcase(name, pattern) for name in names), f"{file} has no function {pattern}"


def qualified(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """The qualified names of all functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name
            yield from qualified(node, f"{prefix}{node.name}.<locals>.")
        else:
            yield from qualified(node, f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix)
