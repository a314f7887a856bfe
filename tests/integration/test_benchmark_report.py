"""What command lines of benchmarks have in common: what cannot be used ends at once, and numbers are written whole."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import checkpoint, growth, stability, step_time
from benchmarks.report import write_report
from benchmarks.turns import rotated


@pytest.mark.parametrize("benchmark", [checkpoint, growth, stability, step_time], ids=lambda it: it.__name__)
def test_benchmarks_refuse_at_once(benchmark: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--rounds", "1"], "--rounds 1: a spread needs at least 2"),
        (["--json", str(tmp_path)], f"--json {tmp_path}: this is a folder; name a file"),
        (["--json", str(tmp_path / "no" / "a.json")], f"there is no folder {tmp_path / 'no'}; create it"),
    ]
    if benchmark in (checkpoint, step_time):
        cases.append((["--threads", "0"], "--threads 0: at least 1"))
    for arguments, problem in cases:
        with pytest.raises(SystemExit) as ended:
            benchmark.main(["--quick", *arguments])  # type: ignore[attr-defined]
        assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = argparse.Namespace(json=file)
    for number in (1, 2):
        write_report(arguments, {"number": number})
        assert json.loads(file.read_text()) == {"number": number} and list(tmp_path.iterdir()) == [file]
    write_report(argparse.Namespace(json=None), {})
    write_report(argparse.Namespace(json=Path("/dev/null")), {"number": 3})
    assert Path("/dev/null").is_char_device()


def test_every_round_begins_with_another() -> None:
    assert ["".join(rotated("abc", number)) for number in range(4)] == ["abc", "bca", "cab", "abc"]
