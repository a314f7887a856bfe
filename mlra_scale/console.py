"""Console output: tables, curves, log messages, and streams whose failure never ends the work."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

TABLE_WIDTH = 120
_WAIT_SECONDS = 5.0
"""How long a non-blocking console that is full may take before a piece of text is dropped."""


class InputError(Exception):
    """The input cannot be used; the text says why and what to do. A command prints it and ends with exit code 2."""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, width: int | None = TABLE_WIDTH) -> str:
    """Returns a table as plain text, for consoles, logs and files.

    Args:
        headers: One per column; a text of several words is broken into lines where the table is too wide.
        rows: The cells, as many per row as there are headers.
        left: Number of columns, from the first one, that are aligned left; the others are aligned right.
        width: Characters of the longest line; longer cells are continued on the next line. None: no limit.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for number, header in enumerate(headers):
        grid.add_column(Text(header), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), color_system=None, force_terminal=False, width=width or 100_000)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def curve(title: str, steps: Sequence[float], values: Sequence[float], width: int = 72, height: int = 10) -> str:
    """Returns a curve as plain text: columns are intervals of steps, with the mean of their values.

    Columns without a value are interpolated. A character is two rows high: `'` is in the upper one, `.` in the lower.

    Args:
        title: Stands above it.
        steps: In ascending order; at least one.
        values: Finite numbers, one for each step.
        width: Characters of the longest line.
        height: Lines of the curve itself.
    """
    margin = 8
    columns, span = width - margin - 2, (steps[-1] - steps[0]) or 1.0
    intervals: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        intervals.setdefault(round((step - steps[0]) / span * (columns - 1)), []).append(value)
    means = {column: sum(found) / len(found) for column, found in intervals.items()}
    low, high = min(means.values()), max(means.values())
    canvas = [[" "] * columns for _ in range(height)]
    known = list(means)
    for left, right in zip(known, [*known[1:], known[-1]], strict=True):  # the last one ends at itself
        for column in range(left, right + 1):
            mean = means[left] + (means[right] - means[left]) * (column - left) / max(1, right - left)
            row = round((high - mean) / ((high - low) or 1.0) * (2 * height - 1))
            canvas[row // 2][column] = ".'"[row % 2 == 0]
    labels = [f"{high:.5g}", *[""] * (height - 2), f"{low:.5g}"]
    first, last = f"{steps[0]:.0f}", f"{steps[-1]:.0f}"
    return "\n".join(
        [
            title,
            *(f"{label:>{margin}} |{''.join(line)}".rstrip() for label, line in zip(labels, canvas, strict=True)),
            f"{'':{margin}} +{'-' * columns}",
            f"{'':{margin}}  {first}{last:>{columns - len(first)}}",
        ]
    )


def set_up_logging(rank: int | None = None) -> None:
    """Sends the messages of `logging.getLogger("mlra_scale...")` to standard error, with their level and rank.

    Ranks other than 0 print warnings and errors only. With rank None the process is no rank.
    """
    handler = _StandardError()
    handler.setFormatter(logging.Formatter(f"%(levelname)s{'' if rank is None else f' (rank {rank})'}: %(message)s"))
    logger = logging.getLogger("mlra_scale")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING if rank else logging.INFO)


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time of a message, not at the time of the set-up."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Unfailing(io.RawIOBase):
    """Writes to a descriptor, and drops what the descriptor refuses: a closed pipe, a full disk, a lost terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def fileno(self) -> int:
        """See io.RawIOBase."""
        return self._descriptor

    def isatty(self) -> bool:
        """See io.RawIOBase."""
        return os.isatty(self._descriptor)

    def write(self, content: Any) -> int:
        """See io.RawIOBase; always says that all of it was written."""
        rest = memoryview(content).cast("B")
        size = len(rest)
        with contextlib.suppress(OSError):
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:
                    if not select.select([], [self._descriptor], [], _WAIT_SECONDS)[1]:
                        break
        return size


def make_unfailing() -> None:
    """Lets no write to the console raise an error, for the rest of the process.

    Characters that the console's encoding lacks are written as escapes. A descriptor 0, 1 or 2 that is closed is opened
    on /dev/null: the next file would otherwise get its number, and what libraries print would go into that file.
    """
    _open_missing()
    for name in ("stdout", "stderr"):
        setattr(sys, name, _unfailing(getattr(sys, name), {"stdout": 1, "stderr": 2}[name]))


def _open_missing() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(opened, True)


def _unfailing(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    buffered = io.BufferedWriter(_Unfailing(descriptor))
    # Line by line on any console: a log of a run that is killed has its last lines.
    return io.TextIOWrapper(buffered, encoding=encoding, errors="backslashreplace", line_buffering=True)


def run_tool(main: Callable[[], int], has_side_effects: bool) -> int:
    """Runs the main function of a command-line tool; returns its exit code, or 1 or 130.

    The console never ends a tool that leaves something behind (`has_side_effects`). One that only prints ends when
    nobody reads any more, and fails with 1 when its output cannot be written. 130 stands for Ctrl-C, SIGTERM and
    SIGHUP, each of which lets the tool clear away what is unfinished.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    if has_side_effects:
        make_unfailing()
    else:
        _open_missing()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        _drop_the_rest()
        return 0
    except OSError as error:
        if error.filename is not None:
            raise
        _drop_the_rest()
        print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _drop_the_rest() -> None:
    """Lets the interpreter's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
