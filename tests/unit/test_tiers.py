"""The tiers of the tests: every test has one, docs/testing.md shows them, and no unit test starts a process."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import tiers


def test_the_table_has_every_test_file() -> None:
    assert [row for row, _ in tiers.written_rows()] == sorted({tiers.row_of(file) for file in tiers.test_files()})


def test_the_table_has_the_tiers_that_were_collected(collected_tiers: tiers.Tiers, pytestconfig: pytest.Config) -> None:
    written = dict(tiers.written_rows())
    for row, found in tiers.rows_of(collected_tiers).items():
        assert found <= written[row], f"{row}: run python -m tests.tiers"
    is_whole_suite = set(collected_tiers) == set(tiers.test_files())
    if is_whole_suite and not any("::" in argument for argument in pytestconfig.args):
        assert tiers.written_table() == tiers.table_of(collected_tiers), "run python -m tests.tiers"


def test_the_table_says_what_the_files_say() -> None:
    lines = tiers.written_table().splitlines()[2:]
    for line, (row, found) in zip(lines, tiers.written_rows(), strict=True):
        assert line == f"| {' | '.join(tiers.cells_of(row, found))} |", "run python -m tests.tiers"


@pytest.mark.parametrize(
    ("markers", "tier"), [(["parametrize"], ""), (["slow", "timeout"], "slow"), (["nightly", "nightly"], "nightly")]
)
def test_a_marker_is_a_tier(markers: list[str], tier: str) -> None:
    assert tiers.tier_of(markers) == tier


def test_a_test_of_two_tiers_is_refused() -> None:
    with pytest.raises(ValueError, match="marked nightly and slow: a test belongs to one tier"):
        tiers.tier_of(["slow", "nightly"])


def item_of(case: str, *kept: str) -> Any:
    """An item of pytest as far as tiers.py looks at it."""
    item = mock.Mock(nodeid=f"test_x.py::test_f[{case}]")
    item.callspec.id = case
    item.get_closest_marker.return_value = pytest.mark.slow_except(*kept).mark
    return item


def test_all_cases_are_slow_but_those_that_are_named() -> None:
    items = [item_of(case, "b", "d") for case in "abcd"]
    assert tiers.mark_slow_cases(items) == []
    assert [item.add_marker.called for item in items] == [True, False, True, False]


def test_a_case_that_is_not_there_is_told() -> None:
    told = tiers.mark_slow_cases([item_of("a", "a", "misspelt"), item_of("b", "a", "misspelt")])
    assert told == ["test_x.py::test_f: slow_except names no case: misspelt"]


def test_a_row_is_a_file_or_a_room_of_unit_tests() -> None:
    assert tiers.row_of("tests/unit/data/test_mix.py") == "tests/unit/data"
    assert tiers.row_of("tests/unit/checkpoint/huggingface/test_modeling.py") == "tests/unit/checkpoint"
    assert tiers.row_of("tests/unit/test_tiers.py") == "tests/unit/test_tiers.py"
    assert tiers.row_of("tests/slurm/test_jobs.py") == "tests/slurm/test_jobs.py"


def run_program() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def start_spawned() -> None:
    multiprocessing.get_context("spawn").Process(target=print).start()


def start_forked() -> None:
    multiprocessing.get_context("fork").Process(target=print).start()


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


STARTS: list[Callable[[], Any]] = [run_program, start_spawned, start_forked, fork, lambda: os.system("true")]


@pytest.mark.parametrize("start", STARTS, ids=["subprocess", "spawn", "fork context", "fork", "system"])
def test_a_unit_test_cannot_start_a_process(start: Callable[[], Any], refused_processes: list[str]) -> None:
    with pytest.raises(AssertionError, match="a unit test starts a process"):
        start()
    assert len(refused_processes) == 1
    # Otherwise this very test fails at its end, as one does whose code catches the refusal.
    refused_processes.clear()


def test_the_folder_of_a_row_that_says_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "ROOT", tmp_path)
    (tmp_path / "test_x.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"test_x\.py has no docstring"):
        tiers.subject_of("test_x.py")
