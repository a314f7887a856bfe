import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from mlra_scale.console import set_up_logging
from mlra_scale.training.record import (
    EventLog,
    JsonLines,
    RecordLost,
    cut_record,
    first_lost_step,
    read_record,
    replace_last,
)


def write(path: Path, steps: Iterable[int]) -> None:
    lines = JsonLines(path)
    for step in steps:
        lines.write({"step": step, "loss": 1.0 / (step + 1)})
    lines.close()


def test_numbers_that_are_not_finite_are_null_and_lines_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": math.nan, "quantiles": {"0.5": math.inf}, "tokens": [(3, -math.inf)]})
    expected = {"step": 1, "loss": None, "quantiles": {"0.5": None}, "tokens": [[3, None]]}
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == expected
    lines.close()


def test_events_show_numbers_that_are_not_finite_as_text(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.event("stopped", step=7, loss=math.nan, gradient_norm=math.inf)
    log.close()
    (event,) = read_record(tmp_path / "events.jsonl")
    assert event.pop("time")
    assert event == {"event": "stopped", "step": 7, "loss": "nan", "gradient_norm": "inf"}


def test_a_file_that_forgets_writes_nothing(tmp_path: Path) -> None:
    JsonLines(None).write({"step": 1})
    EventLog(None).event("start")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recorded", "step", "log_every", "first"),
    [
        (range(1, 7), 6, 1, None),
        (range(1, 5), 6, 1, 5),
        ([], 6, 1, 1),
        ([], 0, 1, None),
        ([1, 10, 20], 27, 10, None),
        ([1, 10], 27, 10, 11),
        ([1], 7, 10, None),
        ([], 7, 10, 1),
    ],
)
def test_a_record_whose_end_was_taken_away_is_noticed(
    recorded: Sequence[int], step: int, log_every: int, first: int | None
) -> None:
    records = [{"step": 0, "tev_mean": 0.1}, *({"step": number, "loss": 1.0} for number in recorded)]
    assert first_lost_step(records, step, log_every) == first


def test_a_cut_removes_the_steps_after_the_checkpoint_and_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_record(path, 5) == 0 and not path.exists()
    write(path, [0, 5, 10, 15])
    assert cut_record(path, 5) == 2
    write(path, [10, 15])
    path.write_text(path.read_text() + '{"step": 20, "lo')
    assert cut_record(path, 20) == 0
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 5, 10, 15]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_was_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    """Events are never cut back to a step: whoever opens the file removes what a full disk left of a line."""
    path = tmp_path / "events.jsonl"
    for whole in ("", '{"event": "start"}\n'):
        path.write_text(whole + '{"event": "stop')
        log = EventLog(path)
        log.event("resume")
        log.close()
        found = [event["event"] for event in read_record(path)]
        assert found == [*(["start"] if whole else []), "resume"]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nxx\n{"step": 5}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_record(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_does_not_end_the_run_and_loses_nothing_silently(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0)
    lines = JsonLines(Path("/dev/full"))
    for step in (1, 2):
        lines.write({"step": step})
    error_output = capsys.readouterr().err
    assert error_output.count("No space left on device") == 1 and "kept until it can be written" in error_output
    lines.sync()
    lines.close()
    assert capsys.readouterr().err.endswith('lost:\n{"step": 1}\n{"step": 2}\n')


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_lines_that_a_disk_refused_are_written_when_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    roomy = lines._file
    with Path("/dev/full").open("ab", buffering=0) as lines._file:
        lines.write({"step": 2})
    lines._file = roomy
    lines.write({"step": 3})
    lines.close()
    assert [item["step"] for item in read_record(path)] == [1, 2, 3]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_lines_that_a_disk_refuses_at_fsync_are_written_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NFS reports a full disk there, and the system forgets what it could not write."""
    set_up_logging(0)
    path, fsync = tmp_path / "metrics.jsonl", os.fsync
    lines = JsonLines(path)
    lines.write({"step": 1})
    lines.sync()
    lines.write({"step": 2})
    os.truncate(path, 12 + 5)  # what the disk has of it, and as long as it has room for

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        patch.setattr(lines, "_check", lambda: None)
        lines.sync()
        lines.write({"step": 3})
        lines.sync()
    error_output = capsys.readouterr().err
    refusal = f"{path} cannot be written ({os.strerror(code)})"
    assert error_output == f"WARNING (rank 0): {refusal}; its lines are kept until it can be written\n", "once"
    assert os.fsync is fsync
    lines.sync()
    assert [item["step"] for item in read_record(path)] == [1, 2, 3] and capsys.readouterr().err == ""
    monkeypatch.setattr(os, "fsync", refuse)
    lines.write({"step": 4})
    lines.close()
    assert f'({os.strerror(code)}); lost:\n{{"step": 4}}\n' in capsys.readouterr().err, "in the end"


def test_many_lines_do_not_wait_for_a_checkpoint_to_be_on_disk(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(3):
        lines.write({"step": step, "text": "x" * 700_000})
    assert len(lines._unsynced) < 1_500_000, "they are in memory too"
    lines.close()
    assert len(read_record(tmp_path / "metrics.jsonl")) == 3


def moved(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    """As `sed -i` and most editors do it."""
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)


def cut(path: Path) -> None:
    os.truncate(path, 3)


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (moved, r"is gone: it has been moved or removed \(what was opened is .*/elsewhere now\)$"),
        (removed, "is gone: it has been moved or removed$"),
        (replaced, "is another one than this run has opened: it has been replaced$"),
        (cut, "has 3 bytes where this run has written 24: it has been cut$"),
    ],
)
def test_a_file_that_another_program_has_taken_is_noticed_at_the_next_sync(
    act: Callable[[Path], None], fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    lines.sync()
    lines.write({"step": 2})
    act(path)
    with pytest.raises(RecordLost, match=f"{path} {fault}"):
        lines.sync()
    lines.close()


def test_the_last_line_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 5])
    replace_last(path, {"step": 5, "loss": math.nan, "validation_loss": 2.0})
    assert read_record(path)[1:] == [{"step": 5, "loss": None, "validation_loss": 2.0}]
