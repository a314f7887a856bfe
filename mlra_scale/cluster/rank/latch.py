"""The latch between loading libraries and beginning: ranks wait at it until the job lets their attempt begin.

It is a pipe that the ranks of a node inherit as their standard input: each takes one byte out of it. When the node's
agent ends, so does the pipe. A rank takes it out of its standard input first, since programs that it starts inherit
that, and might read from it.
"""

from __future__ import annotations

import os
import sys


class Latch:
    """The node's end, for so many ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks, self.is_open = num_ranks, False
        self._reader, self._writer = os.pipe()

    def become_standard_input(self) -> None:
        """Lets processes that are started from now on inherit it."""
        os.dup2(self._reader, 0)

    def open(self) -> None:
        """Lets all ranks through, those that have not come to it yet as well; for one thread."""
        if not self.is_open:
            self.is_open = True
            os.write(self._writer, b"." * self._num_ranks)


def take_latch() -> int:
    """Takes the latch out of a rank's standard input, which is empty from now on; returns its file descriptor."""
    latch, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return latch


def wait_at_latch(latch: int) -> None:
    """Waits in a rank until the latch opens; the process ends with its node's agent."""
    is_open = os.read(latch, 1)
    os.close(latch)
    if not is_open:
        sys.exit("the node's agent has ended")
