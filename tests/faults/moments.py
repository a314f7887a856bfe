"""Moments at which a process gets a signal: when it imports, opens, renames or removes something, or calls a function.

They do not know the code from inside: a moment is a pattern of file names and function names, and a process that never
comes there fails the test. tests/faults/armed/sitecustomize.py waits for them in any Python process.
"""

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ARMED = Path(__file__).resolve().parent / "armed"


@dataclass(frozen=True)
class Moment:
    """When a process gets a signal.

    Attributes:
        event: Pattern of fnmatch for "import MODULE", "open r|w PATH", "rename FROM TO", "remove PATH", "rmdir PATH",
            "mkdir PATH", "truncate PATH", "spawn" or "call FILE.py QUALNAME" (FILE.py without wildcards).
        occurrence: Which of those events.
        signal: What the process gets.
        rank: Of the process; the variable RANK, 0 without it.
        program: Part of the process's command line.
    """

    event: str
    occurrence: int = 1
    signal: int = signal.SIGKILL
    rank: int = 0
    program: str = ""

    def __str__(self) -> str:
        times = f", time {self.occurrence}" if self.occurrence > 1 else ""
        name = signal.Signals(self.signal).name if self.signal else "nothing"
        return f"{name} at {self.event}{times}{f', rank {self.rank}' * (self.rank > 0)}"


def variables(moments: Sequence[Moment], marks: Path) -> dict[str, str]:
    """The environment that arms processes; `marks`: a new folder, where each moment leaves a file when it has come."""
    marks.mkdir(parents=True)
    listed = [asdict(moment) | {"mark": str(marks / str(place))} for place, moment in enumerate(moments)]
    return {"MOMENTS": json.dumps(listed)}


def missed(moments: Sequence[Moment], marks: Path) -> list[str]:
    """Moments that have not come."""
    return [str(moment) for place, moment in enumerate(moments) if not (marks / str(place)).exists()]
