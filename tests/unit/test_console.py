"""Tables and log messages; and the console never ends the work: closed pipes, full disks, encodings."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlra_scale import console


@pytest.fixture
def broken() -> Iterator[int]:
    """A descriptor whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def stream(descriptor: int, encoding: str = "utf-8") -> io.TextIOWrapper:
    plain = io.TextIOWrapper(io.FileIO(os.dup(descriptor), "w"), encoding=encoding)
    unfailing = console._unfailing(plain, descriptor)
    assert isinstance(unfailing, io.TextIOWrapper)
    return unfailing


def test_a_table_is_aligned_plain_text_and_its_cells_are_not_markup() -> None:
    rows = [["first", "[bold] :smile:", "1"], ["b", "\u6df1\u3044", "12,000"]]
    lines = console.table(["run", "note", "tokens"], rows, left=2).split("\n")
    assert lines == [
        "run    note            tokens",
        "first  [bold] :smile:       1",
        "b      \u6df1\u3044            12,000",
    ], "of two columns each on a terminal"


def test_a_table_keeps_to_its_width_and_loses_no_text() -> None:
    cells = ["x" * 50, "several words " * 10, "y" * 40, "3.14"]
    lines = console.table(["a", "b", "c", "d"], [cells], left=4).split("\n")
    assert max(map(len, lines)) <= console.TABLE_WIDTH
    for letter, number in (("x", 50), ("y", 40)):
        assert sum(line.count(letter) for line in lines) == number
    assert " ".join(lines).count("several") == 10 and "3.14" in lines[1]
    assert console.table(["a", "b"], [["x" * 300, "y"]], width=None).split("\n")[1] == f"{'x' * 300}  y"


def test_a_curve_falls_from_its_first_value_to_its_last() -> None:
    assert console.curve("loss", [1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0], width=23, height=2).split("\n") == [
        "loss",
        "       4 |'''...",
        "       1 |      '''''..",
        "         +-------------",
        "          1           4",
    ]


def test_a_long_curve_has_the_means_of_intervals_and_one_value_is_a_curve_too() -> None:
    lines = console.curve("loss", range(2000), [5.0 + step // 1000 + step % 2 for step in range(2000)], 50, 3).split(
        "\n"
    )
    assert [line[10:] for line in lines[1:4]] == [" " * 20 + "'" * 20, "", "." * 20]
    assert (lines[1].split()[0], lines[3].split()[0], max(map(len, lines))) == ("6.5098", "5.4902", 50)
    assert console.curve("loss", [7], [2.0]).split("\n")[1].split() == ["2", "|'"], "no division by zero"


def test_messages_have_level_and_rank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("mlra_scale")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    for rank in (None, 0, 3):
        console.set_up_logging(rank)
        logging.getLogger("mlra_scale.training").info("of rank %s", rank)
        logging.getLogger("mlra_scale.training").warning("step %d", 5)
    assert capsys.readouterr().err.splitlines() == [
        "INFO: of rank None",
        "WARNING: step 5",
        "INFO (rank 0): of rank 0",
        "WARNING (rank 0): step 5",
        "WARNING (rank 3): step 5",
    ]


def test_a_closed_pipe_and_a_full_disk_take_everything(broken: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (broken, full):
        with pytest.raises(OSError):
            os.write(descriptor, b"x")
        shown = stream(descriptor)
        for _ in range(3):
            print("step 1", "x" * 100_000, file=shown, flush=True)
        assert shown.fileno() == descriptor and not shown.isatty()
    os.close(full)


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        print("runs/l\u00e4ufe \u2713", file=stream(file.fileno(), "ascii"))
    assert (tmp_path / "log").read_bytes() == b"runs/l\\xe4ufe \\u2713\n", "at the end of the line, without a flush"


def test_a_full_pipe_that_does_not_block_is_waited_for_and_then_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_WAIT_SECONDS", 0.05)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    print("x" * 1_000_000, file=stream(writer))
    assert os.read(reader, 10) == b"x" * 10
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("target", ["pipe", "/dev/full"])
def test_a_tool_that_only_prints_says_that_nobody_got_it(
    target: str, broken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    descriptor = os.dup(broken) if target == "pipe" else os.open(target, os.O_WRONLY)
    monkeypatch.setattr(console, "_drop_the_rest", lambda: None)  # of the test's own standard output

    def main() -> int:
        print("what was asked for", file=sys.stdout)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))))
        code = console.run_tool(main, has_side_effects=False)
    os.close(descriptor)
    assert code == (0 if target == "pipe" else 1)
    assert capsys.readouterr().err == (
        "" if target == "pipe" else "standard output cannot be written: No space left on device\n"
    )


def test_an_interrupted_tool_says_so_and_an_error_of_a_file_is_not_one_of_the_console(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(error: BaseException) -> int:
        raise error

    assert console.run_tool(lambda: fail(KeyboardInterrupt()), has_side_effects=False) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(FileNotFoundError):
        console.run_tool(lambda: fail(FileNotFoundError(2, "No such file", "missing.txt")), has_side_effects=False)
