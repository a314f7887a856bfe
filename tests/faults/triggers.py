"""Triggers at which a process gets a signal: when it imports, opens, renames or removes something, or calls a function.

They do not know the code from inside: a trigger is a pattern of file names and function names, and a process that never
comes there fails the test. tests/faults/armed/sitecustomize.py waits for them in any Python process.
"""

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ARMED = Path(__file__).resolve().parent / "armed"


@dataclass(frozen=True)
class Trigger:
    """When a process gets a signal, or an error of the operating system.

    Attributes:
        event: Pattern of fnmatch for "import MODULE", "open r|w PATH", "rename FROM TO", "remove PATH", "rmdir PATH",
            "mkdir PATH", "truncate PATH", "spawn", "call FILE.py QUALNAME" (FILE.py without wildcards) or "point NAME",
            one of mlra_scale.checkpoint.failpoints.
        occurrence: Which of those events.
        signal: What the process gets; 0: nothing.
        rank: Of the process; the variable RANK, 0 without it.
        program: Part of the process's command line.
        error: Error number that a point raises instead of the signal; 0: none.
    """

    event: str
    occurrence: int = 1
    signal: int = signal.SIGKILL
    rank: int = 0
    program: str = ""
    error: int = 0

    def __str__(self) -> str:
        times = f", time {self.occurrence}" if self.occurrence > 1 else ""
        name = signal.Signals(self.signal).name if self.signal and not self.error else "nothing"
        return f"{name} at {self.event}{times}{f', rank {self.rank}' * (self.rank > 0)}"


class Trap:
    """Triggers for the processes of one command, and whether they have come.

    Args:
        triggers: Triggers that must come.
        log: The log of the command: beside it lie the marks that each trigger leaves when it was reached.
        never: Triggers at which no process may come; they do nothing.
    """

    def __init__(self, triggers: Sequence[Trigger], log: Path, never: Sequence[Trigger] = ()) -> None:
        self._triggers, self._never = list(triggers), list(never)
        number = sum(1 for _ in log.parent.glob(f"{log.name}.marks-*"))
        self._marks = log.with_name(f"{log.name}.marks-{number}")

    def variables(self) -> dict[str, str]:
        """The environment that arms processes."""
        if not (triggers := [*self._triggers, *self._never]):
            return {}
        self._marks.mkdir(parents=True)
        listed = [asdict(trigger) | {"mark": str(self._marks / str(place))} for place, trigger in enumerate(triggers)]
        return {"TRIGGERS": json.dumps(listed)}

    def missed(self) -> list[str]:
        """The triggers that were not reached."""
        return [str(trigger) for place, trigger in enumerate(self._triggers) if not (self._marks / str(place)).exists()]

    def check(self, output: str) -> None:
        """Fails if a trigger was not reached, or one that must never be was."""
        assert not (late := self.missed()), f"did not come to {late}\n{output[-1000:]}"
        marks = [self._marks / str(len(self._triggers) + place) for place in range(len(self._never))]
        come = [str(trigger) for trigger, mark in zip(self._never, marks, strict=True) if mark.exists()]
        assert not come, f"came to {come}"
