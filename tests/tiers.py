"""The tiers of the tests: which marker belongs to which command, and the table of docs/testing.md.

    python -m tests.tiers        collects all tests and writes the table anew

A test without a marker of a tier is in ``make test``. ``make test-all`` adds those marked ``slow``;
``make test-nightly`` runs those marked ``nightly``. ``slow_except("id", ...)`` on a parametrized test marks all cases
slow but those that it names by their ids in brackets.
"""

import ast
import contextlib
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "testing.md"
COMMANDS = {"": "make test", "slow": "make test-all", "nightly": "make test-nightly"}
"""Marker of a tier ("" is no marker) and the command that brings it in."""
BEGIN, END = "<!-- written by python -m tests.tiers -->\n", "<!-- end -->\n"
HEADER = ["tests", "what is tested", *(f"`{command}`" for command in COMMANDS.values())]

Tiers = dict[str, set[str]]
"""Test file, relative to the project, to the tiers of its tests."""


def tier_of(markers: Iterable[str]) -> str:
    """The tier of a test with these markers.

    Raises:
        ValueError: The test is marked for two tiers.
    """
    found = sorted(set(markers) & set(COMMANDS))
    if len(found) > 1:
        raise ValueError(f"marked {' and '.join(found)}: a test belongs to one tier")
    return found[0] if found else ""


def mark_slow_cases(items: Iterable[pytest.Item]) -> list[str]:
    """Marks the cases slow that ``slow_except`` does not name.

    Returns:
        What ``slow_except`` names and is not there: a line per test.
    """
    missing: dict[str, set[str]] = {}
    for item in items:
        mark = item.get_closest_marker("slow_except")
        if mark is not None:
            case = item.callspec.id  # type: ignore[attr-defined]
            missing.setdefault(item.nodeid.split("[")[0], set(mark.args)).discard(case)
            if case not in mark.args:
                item.add_marker(pytest.mark.slow)
    return [
        f"{test}: slow_except names no case: {', '.join(sorted(names))}" for test, names in missing.items() if names
    ]


def tiers_of(items: Iterable[pytest.Item]) -> Tiers:
    """The tiers of each file.

    Raises:
        pytest.UsageError: Tests that are marked for two tiers, all of them named.
    """
    tiers: Tiers = {}
    problems = []
    for item in items:
        try:
            tier = tier_of(mark.name for mark in item.iter_markers())
        except ValueError as error:
            problems.append(f"{item.nodeid}: {error}")
            continue
        tiers.setdefault(item.path.relative_to(ROOT).as_posix(), set()).add(tier)
    if problems:
        raise pytest.UsageError("\n".join(problems))
    return tiers


def test_files() -> list[str]:
    """All test files, relative to the project."""
    return sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("test_*.py"))


def row_of(file: str) -> str:
    """The table's row of a test file: the unit tests of a room share one, every other file has its own."""
    parts = file.split("/")
    return "/".join(parts[:3]) if parts[1] == "unit" else file


def subject_of(row: str) -> str:
    """What a row tests: the first paragraph of the docstring of its file, or of its folder's ``__init__.py``."""
    path = ROOT / row
    source = (path / "__init__.py" if path.is_dir() else path).read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        raise ValueError(f"{row} has no docstring that says what its tests cover")
    return " ".join(docstring.split("\n\n")[0].split())


def rows_of(tiers: Tiers) -> dict[str, set[str]]:
    """The tiers of each row."""
    rows: dict[str, set[str]] = {}
    for file in sorted(tiers):
        rows.setdefault(row_of(file), set()).update(tiers[file])
    return rows


def cells_of(row: str, tiers: set[str]) -> list[str]:
    """A line of the table."""
    return [f"`{row}`", subject_of(row), *("yes" if tier in tiers else "" for tier in COMMANDS)]


def table_of(tiers: Tiers) -> str:
    """The table, in Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *(cells_of(row, found) for row, found in rows_of(tiers).items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def written_table() -> str:
    """The table as it stands in docs/testing.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def written_rows() -> Iterator[tuple[str, set[str]]]:
    """The rows of docs/testing.md with the tiers that they have there."""
    for line in written_table().splitlines()[2:]:
        name, _, *marks = (cell.strip() for cell in line.strip("|").split("|"))
        yield name.strip("`"), {tier for tier, mark in zip(COMMANDS, marks, strict=True) if mark}


class Collector:
    """A plugin of pytest that keeps what was collected."""

    def __init__(self) -> None:
        self.tiers: Tiers = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tiers = tiers_of(session.items)


def main() -> int:
    """Writes the table."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(["--collect-only", "-q", "-m", "", str(ROOT / "tests")], plugins=[collector])
    if code != pytest.ExitCode.OK:
        print(output.getvalue()[-3000:], file=sys.stderr)
        return int(code)
    before, table = written_table(), table_of(collector.tiers)
    text = DOCUMENT.read_text(encoding="utf-8").replace(BEGIN + before + END, BEGIN + table + END)
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"{DOCUMENT.relative_to(ROOT)}: {'as it was' if table == before else 'written anew'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
