"""Kills and disturbances from outside, each against its promise: ranks, disks, signals, damaged files, Slurm jobs."""

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from mlra_scale.checkpoint.failpoints import FAILPOINTS
from tests.faults.bench import Bench
from tests.faults.case import Case
from tests.faults.cases import CASES
from tests.faults.saves import in_turn
from tests.slurm.cluster import slurm_missing
from tests.support.training_runs import ROOT

TIERS = {"": (), "slow": (pytest.mark.slow,), "nightly": (pytest.mark.nightly, pytest.mark.timeout(7200))}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def mount_missing(folder: Path) -> str | None:
    """Why no disk can be mounted; None if one can."""
    command = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        return "the right to mount a tmpfs (the case of a limit on file sizes stands in for it)"
    subprocess.run(["umount", str(folder)], check=True)
    return None


@pytest.mark.parametrize("case", [pytest.param(case, marks=TIERS[case.tier], id=case.name) for case in CASES])
def test_a_promise_is_kept(case: Case, bench: Bench, tmp_path: Path) -> None:
    missing = {"": lambda: None, "slurm": slurm_missing, "mount": lambda: mount_missing(tmp_path)}[case.needs]()
    if missing is not None:
        pytest.skip(f"needs {'Slurm: ' if case.needs == 'slurm' else ''}{missing}")
    case.act(bench, tmp_path)


def test_there_are_enough_of_them() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(case.num_kills for case in CASES) >= 200 and sum(case.num_kills == 0 for case in CASES) >= 60
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
