"""What a case is, and the chains of SIGKILLs that most of them are made of."""

import hashlib
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.bench import Bench, assert_sound, program, start
from tests.faults.launching import Armed
from tests.faults.triggers import Trigger

Act = Callable[[Bench, Path], object]
"""Does it, in a folder of its own; an AssertionError says what was not as promised."""


@dataclass(frozen=True)
class Case:
    """Something that is done to the project from outside, with what must come of it.

    Attributes:
        name: Of the case, unique.
        done: What is done.
        promise: What must come of it.
        act: Does it.
        num_kills: SIGKILLs in it; 0: disturbances only.
        tier: The tests that it belongs to: "" for the daily ones, "slow" or "nightly".
        needs: "slurm": the local Slurm cluster, so that such cases run one after the other; "mount": disks of its own;
            "fuse": a file system of its own that fails on request.
        kinds: Number of its disturbances by kind; empty where it has no kills: one of another kind.
    """

    name: str
    done: str
    promise: str
    act: Act
    num_kills: int = 0
    tier: str = "nightly"
    needs: str = ""
    kinds: Mapping[str, int] = field(default_factory=dict)

    @property
    def faults(self) -> dict[str, int]:
        """Number of all its faults by kind."""
        kills = {KILL: self.num_kills} if self.num_kills else {}
        return {**kills, **self.kinds} or {OTHER: 1}


KILL, FLIP, TRUNCATION, REPLACED = "SIGKILL", "flipped bit", "truncation", "replaced or removed file"
FULL, EIO, OTHER = "full disk", "EIO", "signal, console, place or Slurm"


class NotKept(AssertionError):
    """Some of several promises were not kept; `number`: how many."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


Kill = Trigger | tuple[Trigger, ...]
SAME = "nothing that was reported is lost, nothing torn is visible, the end equals that of the undisturbed run bitwise"
WHOLE = "no output, or a whole one; the same command then makes what the undisturbed one makes"


def each(named: Iterable[tuple[object, Callable[[], object]]]) -> None:
    """Does everything, and fails in the end with the name of each that failed."""
    named = list(named)
    failures = []
    for name, act in named:
        try:
            act()
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise NotKept(f"{len(failures)} of {len(named)}:\n" + "\n".join(failures), len(failures))


def killed_runs(
    name: str,
    layout: str,
    *kills: Kill,
    more: Sequence[str] = (),
    is_real: bool = False,
    tier: str = "nightly",
    **fields: int,
) -> Case:
    """A training that is killed at each of these triggers, continued after each, and compared at its end."""

    def act(bench: Bench, place: Path) -> None:
        training = bench.training(layout, *more, **fields)
        runs = [place / "run-0"]

        def kill(triggers: tuple[Trigger, ...]) -> None:
            try:
                if is_real:
                    code = program(training, runs[-1], resume=runs[-1].exists(), triggers=triggers).wait()
                    assert code == -signal.SIGKILL or training.num_ranks > 1, code
                else:
                    start(training, runs[-1], resume=runs[-1].exists(), triggers=triggers, code=-signal.SIGKILL)
                assert_sound(runs[-1])
            except AssertionError:
                runs.append(place / f"run-{len(runs)}")
                raise

        chain = [kill if isinstance(kill, tuple) else (kill,) for kill in kills]
        each((triggers[-1], partial(kill, triggers)) for triggers in chain)
        bench.finish(training, runs[-1])

    shown = ", ".join(
        str(kill if isinstance(kill, Trigger) else kill[-1]).removeprefix("SIGKILL at ") for kill in kills
    )
    return Case(name, f"{layout}: SIGKILL at {shown}", SAME, act, len(kills), tier)


def killed_commands(
    name: str,
    command: Callable[[Bench, Path], Sequence[str]],
    *kills: Trigger,
    same: Callable[[Path, Path], None],
    prepare: Callable[[Bench, Path], object] | None = None,
    is_allowed: Callable[[Path], bool] = lambda output: not output.exists(),
) -> Case:
    """A command that makes a folder is killed at each of these triggers, and then runs to its end.

    Args:
        name: Of the case.
        command: The command line, for an output.
        kills: When.
        same: Fails unless an output (the first) is like that of the undisturbed command.
        prepare: Puts at the output what is there before.
        is_allowed: Whether what is at the output after a kill is as it was before.
    """

    def act(bench: Bench, place: Path) -> None:
        output, undisturbed = place / "killed" / "out", place / "undisturbed" / "out"
        for path in (output, undisturbed):
            path.parent.mkdir()
            if prepare is not None:
                prepare(bench, path)
        run_to_end(command(bench, undisturbed), place / "undisturbed.log")

        def kill(trigger: Trigger) -> None:
            code = Armed(command(bench, output), place / "killed.log", [trigger]).wait()
            assert code == -signal.SIGKILL, code
            if not is_allowed(output):
                same(output, undisturbed)

        each((trigger, partial(kill, trigger)) for trigger in kills)
        if is_allowed(output):
            run_to_end(command(bench, output), place / "killed.log")
        same(output, undisturbed)
        left = [path.name for path in output.parent.iterdir() if path.name.startswith(".")]
        assert left == [path.name for path in undisturbed.parent.iterdir() if path.name.startswith(".")], left

    shown = ", ".join(str(kill).removeprefix("SIGKILL at ") for kill in kills)
    return Case(name, f"SIGKILL at {shown}", WHOLE, act, len(kills))


def run_to_end(command: Sequence[str], log: Path, code: int = 0, timeout: float = 300.0, **options: Any) -> str:
    """Runs a command line, which must end with this code and without a traceback; returns its output."""
    started = Armed(command, log, **options)
    ended = started.wait(timeout)
    output = started.output()
    assert ended == code, f"code {ended}, not {code}\n{output[-1000:]}"
    assert code not in (0, 2, 5) or "Traceback" not in output, output[-1000:]
    return output


def assert_refused(output: str, *parts: str) -> None:
    """Fails unless a refusal is a few lines without a traceback that name these things."""
    assert "Traceback" not in output and len(output) < 4000, output[-1000:]
    for part in parts:
        assert part in output, f"{part!r} is not named\n{output[-1000:]}"


def digests(folder: Path, *without: str) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def flip(path: Path, offset: int | None = None) -> None:
    """Flips a bit of a byte, by default of the one in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    path.write_bytes(bytes(content))
