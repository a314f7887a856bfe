"""Disturbances: signals and terminals, and consoles that take nothing."""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlra_scale.training.run_directory import RunDirectory
from tests.faults.bench import FLAT, GUARDED, MEASURED, Bench, assert_sound, program
from tests.faults.case import SAME, Case
from tests.faults.launching import Armed
from tests.faults.training import Training, assert_as_undisturbed, reported_checkpoints
from tests.faults.triggers import Trigger
from tests.support.processes import CTRL_C, Program
from tests.support.training_runs import events

LONG_EVALUATION = (
    "evaluation.every=1",
    "evaluation.batches=1000",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
)
LONG = 4000
"""Steps of a run that is stopped long before."""
WITHOUT_STREAMS = ("bash", "-c", 'exec "$0" "$@" >&- 2>&-')
SOON = 120.0
"""Seconds in which a stop must be done, on a machine with much other work too."""
SAVED = "it saves after the step and exits as preempted, names the checkpoint, and the continued run is the same"
TOO_EARLY = "it exits as preempted, says that there is no checkpoint, and the same run begins anew"
ROLLED_BACK = (
    "it exits as preempted with a sound checkpoint, and the rollback is in guard.json (equality is not claimed)"
)
PREEMPTED = 5


def step_of(run: Path) -> int:
    """The last step that a run has recorded."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[-2:] if path.exists() else []
    return max((int(found[1]) for line in lines if (found := re.match(r'\{"step": (\d+),.*\n', line))), default=-1)


def trains(launch: Program, run: Path, steps: int = 3) -> None:
    """Waits until a run has come to a step, and a random moment more."""
    launch.wait_until(lambda: step_of(run) >= steps)
    time.sleep(random.random() * 0.3)


def assert_stopped(launch: Program, run: Path, training: Training, is_back: bool, is_hung_up: bool) -> int:
    """Fails unless a run ends soon, has saved its last step, and said so; returns that step.

    Args:
        launch: The running run.
        run: Its directory.
        training: What it trains.
        is_back: Whether it goes back to an earlier step just then.
        is_hung_up: Whether its terminal was closed, so that nobody reads what it says.
    """
    before = 1 if is_back else step_of(run)
    code, output = launch.wait(SOON), launch.output()
    assert code in ((PREEMPTED,) if training.num_ranks == 1 else (1, PREEMPTED)), f"code {code}\n{output[-1000:]}"
    step = assert_sound(run)
    assert step >= before, f"step {before} was done when the signal came, and the newest checkpoint is {step}"
    assert step == max(0, step_of(run)) and reported_checkpoints(run)[-1:] == [step] * (step > 0)
    names = [event["event"] for event in events(run)]
    assert names[-1] in ("stopped", "preempted") and (is_back or not step or names[-2:] == ["checkpoint", "preempted"])
    if training.num_ranks == 1:
        assert "Traceback" not in output, output[-1000:]
    if not is_hung_up:
        assert f"step-{step:08d}" in output if step else "no checkpoint" in output, output[-1000:]
    return step


def stop(
    name: str,
    done: str,
    act: Callable[[Armed], object],
    layout: str = "single",
    is_saved: bool = True,
    at: Trigger | None = None,
    promise: str = "",
    more: Sequence[str] = (),
    tier: str = "nightly",
    **options: Any,
) -> Case:
    """A run that something stops.

    Args:
        name: Of the case.
        done: What is done, in words.
        act: Does it when the run has done some steps; with `at` the trigger does.
        layout: Of the run.
        is_saved: Whether the stop asks for a save; else it kills.
        at: When the run gets a signal.
        promise: What must come of it, where it is not what the other stops promise.
        more: Overrides.
        tier: Of the case.
        options: Of bench.program.
    """

    def do(bench: Bench, place: Path) -> None:
        is_guarded = GUARDED[0] in more
        training = bench.training(layout, *FLAT, *more, steps=LONG, every=1000)
        if is_guarded:
            training = bench.training(layout, *more, steps=16)
        run = place / "run"
        launch = program(training, run, triggers=() if at is None else (at,), **options)
        try:
            if at is None:
                trains(launch, run)
            else:
                launch.wait_until(lambda: not launch.trap.missed())
            act(launch)
            if is_saved:
                assert_stopped(launch, run, training, is_back=is_guarded, is_hung_up=act is Program.hang_up)
                is_typed = "terminal" in options and act is not Program.hang_up
                assert not is_typed or "Ctrl-C again ends it at once" in launch.output()
            else:
                launch.assert_nothing_is_left(SOON)
                assert launch.wait(1.0) != 0
                assert_sound(run)
            if is_guarded:
                # The guard may go back to the stop's checkpoint too, which the undisturbed run does not have.
                assert RunDirectory(run).read_rollbacks(), "the rollback is lost"
            else:
                bench.finish(replace(training, steps=assert_sound(run) + 2), run)
        finally:
            launch.end()

    promise = promise or (SAVED if is_saved else f"all its processes end within {SOON:.0f} s; {SAME}")
    return Case(name, done, promise, do, tier=tier)


def typed(times: int, pause: float = 0.05) -> Callable[[Program], None]:
    """Presses Ctrl-C."""

    def act(launch: Program) -> None:
        for press in range(times):
            time.sleep(pause * (press > 0))
            launch.type(CTRL_C)

    return act


def sent(number: int) -> Callable[[Program], None]:
    """Sends a signal."""
    return lambda launch: launch.signal(number)


def nothing(launch: Program) -> None:
    """Does nothing."""


def during(
    what: str, event: str, occurrence: int = 1, more: Sequence[str] = MEASURED, within: int = 0, **options: Any
) -> Case:
    """SIGTERM while something else than a step is done; `within`: this one of the next events must not come."""
    trigger = Trigger(event, occurrence, signal.SIGTERM)
    never = [Trigger(event, occurrence + within, 0)] if within else []
    return stop(f"SIGTERM in {what}", f"kill -TERM in {what}", nothing, at=trigger, more=more, never=never, **options)


def console(
    name: str, done: str, options: Callable[[], dict[str, Any]], folder: str = "run", tier: str = "nightly"
) -> Case:
    """A run whose console takes nothing, or not everything; `options`: of bench.program."""

    def act(bench: Bench, place: Path) -> None:
        training, run = bench.training(), place / folder
        launch = program(training, run, **options())
        code, output = launch.wait(), launch.output()
        assert code == 0, f"code {code}\n{output[-1000:]}"
        assert "cannot be written" not in output and str(run) not in output.replace(str(run) + "/", ""), output[-2000:]
        assert_as_undisturbed(run, bench.reference(training), training.steps)

    promise = "exit code 0, and the run is the undisturbed one; nothing blames the run directory"
    return Case(name, done, promise, act, tier=tier)


def closed_pipe(num_lines: int) -> int:
    """The writing end of a pipe whose reader leaves after so many lines, as `head` does."""
    reading, writing = os.pipe()

    def read() -> None:
        with os.fdopen(reading, "rb", buffering=0) as file:
            for _ in range(num_lines):
                while file.read(1) not in (b"\n", b""):
                    continue

    threading.Thread(target=read, daemon=True).start()
    return writing


def full() -> int:
    """A device without room."""
    return os.open("/dev/full", os.O_WRONLY)


STOPS = (
    stop("Ctrl-C", "Ctrl-C in a terminal", typed(1), terminal=True, tier=""),
    stop("Ctrl-C, torchrun", "Ctrl-C in a terminal under torchrun", typed(1), "pipeline2", terminal=True, tier="slow"),
    stop("Ctrl-C twice", "Ctrl-C twice in a terminal", typed(2), is_saved=False, terminal=True),
    stop("Ctrl-C twice, torchrun", "as before, torchrun", typed(2), "zero3-dp2", is_saved=False, terminal=True),
    stop("terminal closed", "SIGHUP by closing the terminal", Program.hang_up, terminal=True, tier="slow"),
    stop("terminal closed, torchrun", "as before, torchrun", Program.hang_up, "zero1-dp2", terminal=True),
    stop("SIGINT from outside", "kill -INT", sent(signal.SIGINT)),
    stop("SIGTERM of torchrun", "kill -TERM of torchrun", sent(signal.SIGTERM), "pipeline2"),
    during("evaluation", "call mlra_scale/parallel/zero_engine.py *eval_batch", 150, LONG_EVALUATION, within=1),
    during("the probe before step 1", "call mlra_scale/stability/activations.py *", 20, promise=TOO_EARLY),
    during("the probe after a step", "call mlra_scale/stability/activations.py *", 40),
    during("the noise estimate", "call mlra_scale/stability/gradients.py *.before_step", 2),
    during("a save", "open w *rank-00000*", 1, ("checkpoint.every=2",)),
    during("a rollback", "call mlra_scale/training/loop/session.py *.roll_back", 1, GUARDED, promise=ROLLED_BACK),
)
CONSOLES = (
    console("stdout is a closed pipe", "the reader of stdout is gone", lambda: {"stdout": closed_pipe(0)}),
    console("stdout is closed after 9 lines", "... | head -n 9", lambda: {"stdout": closed_pipe(9)}, tier="slow"),
    console("stdout is full", "stdout is /dev/full", lambda: {"stdout": full()}),
    console(
        *("stdout and stderr are full", "both are /dev/full", lambda: {"stdout": full(), "stderr": full()}),
        tier="slow",
    ),
    console(
        "no stdout", "the command is started without stdout and stderr", lambda: {"shell": WITHOUT_STREAMS}, tier="slow"
    ),
    console(
        "an ASCII console",
        "PYTHONIOENCODING=ascii, and a run directory whose name is not",
        lambda: {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"},
        "l\u00e4uft \u2603",
        tier="slow",
    ),
)
CASES = (*STOPS, *CONSOLES)
