"""Each rank dies at each point of a save, and ranks die at random moments; the disk refuses at a point of a save.

The points are those of mlra_scale/checkpoint/failpoints.py: a rank that passes one dies by SIGKILL in the writer
thread or the main one. `--resume auto` starts again and ends the run, which must be the undisturbed one, bit by bit.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlra_scale.checkpoint.failpoints import FAILPOINTS
from mlra_scale.training.exit_codes import ExitCode
from tests.faults.bench import Bench, log_of, program, start
from tests.faults.case import FULL as FULL_DISK
from tests.faults.case import SAME, Case, assert_refused
from tests.faults.kills import STEP
from tests.faults.launching import Armed, Forked
from tests.faults.training import LAYOUTS, Training, assert_as_undisturbed, assert_way_back
from tests.faults.triggers import Trigger
from tests.support.training_runs import curve, events

STEPS, EVERY = 6, 2
FIELDS = {"steps": STEPS, "every": EVERY, "keep_last": 1}
"""Three saves, each of which removes the one before."""
FULL: dict[str, Any] = {"signal": 0, "error": errno.ENOSPC}
EARLY = 0.1
"""Share of the kills that may come before the first step of a start, while the checkpoint is being loaded."""
Launch = Armed | Forked
Launcher = Callable[..., Launch]


def forked(training: Training, run: Path, triggers: Sequence[Trigger] = ()) -> Launch:
    """Starts or continues a run in forked ranks."""
    return Forked(training.arguments(run, run.exists()), training.num_ranks, log_of(run), triggers)


def real(training: Training, run: Path, triggers: Sequence[Trigger] = ()) -> Launch:
    """Starts or continues a run by torchrun."""
    return program(training, run, resume=run.exists(), triggers=triggers)


def kills_at_points(num_ranks: int, saves: Sequence[int]) -> list[Trigger]:
    """Every point with every rank that passes it, at every one of the given saves."""
    return [
        Trigger(f"point {point}", save, rank=rank)
        for point, who in FAILPOINTS.items()
        for rank in (range(num_ranks) if who.startswith("every rank") else (0,))
        # The first removal belongs to the second save.
        for save in ((1,) if point == "retention" else saves)
    ]


def killed_save(layout: str, kill: Trigger, launcher: Launcher, tier: str) -> Case:
    """A rank is killed at a point of a save, and the run is continued."""

    def act(bench: Bench, place: Path) -> None:
        training, run = bench.training(layout, **FIELDS), place / "run"
        assert launcher(training, run, triggers=[kill]).wait() != 0, "the point was not reached"
        step = assert_way_back(run)
        assert step > 0 or (kill.occurrence == 1 and "retention" not in kill.event), "nothing to continue from"
        assert launcher(training, run).wait() == 0, log_of(run).read_text()[-3000:]
        assert_as_undisturbed(run, bench.reference(training), training.steps)
        resumed = [event["step"] for event in events(run) if event["event"] == "resume"]
        if "before-latest" in kill.event and step > EVERY:
            # A start continues from what `latest` names, and saves the complete one once more.
            step -= EVERY
        assert resumed == ([] if step == 0 else [step]), (resumed, step)

    name = f"{layout} by {launcher.__name__} processes: rank {kill.rank} at {kill.event}, save {kill.occurrence}"
    return Case(name, str(kill), SAME, act, num_kills=1, tier=tier)


@dataclass
class Chain:
    """A run that is killed and continued until it is done.

    Attributes:
        training: What is trained.
        run: Its directory.
        launcher: How processes are started.
        draw: Gives the moments and the victims.
        seconds: How long its training takes when nobody disturbs it.
        starting: Seconds that a start takes.
    """

    training: Training
    run: Path
    launcher: Launcher
    draw: random.Random
    seconds: float
    starting: float

    def num_starts(self) -> int:
        """Starts that got as far as training."""
        path = self.run / "events.jsonl"
        return sum(event["event"] == "start" for event in events(self.run)) if path.exists() else 0

    def kill_once(self) -> bool:
        """Starts, and kills one rank or all at a random moment; returns whether the run was done before."""
        launch, before = self.launcher(self.training, self.run), self.num_starts()
        everybody = list(range(self.training.num_ranks))
        is_early, victims = self.draw.random() < EARLY, self.draw.choice([*([rank] for rank in everybody), everybody])
        try:
            while not is_early and self.num_starts() == before and not launch.has_ended():
                time.sleep(0.02)
            end = time.perf_counter() + self.draw.uniform(0.0, self.starting if is_early else self.seconds)
            while time.perf_counter() < end and not launch.has_ended():
                time.sleep(0.02)
            ranks = launch.ranks()
            struck = [ranks[rank] for rank in victims if rank in ranks]
            for process in struck:
                os.kill(process, signal.SIGKILL)
            code = launch.wait()
            assert code == 0 or struck, f"it ended by itself: {log_of(self.run).read_text()[-3000:]}"
            return code == 0
        finally:
            launch.end()


def random_kills(
    layout: str, precision: str, num_kills: int, launcher: Launcher, starting: float, tier: str, **fields: int
) -> Case:
    """A training is killed at random triggers, in as many runs as that takes; each ends as the undisturbed one."""

    def act(bench: Bench, place: Path) -> None:
        training = bench.training(layout, precision=precision, **fields)
        reference, draw = bench.reference(training), random.Random(7)
        seconds = float(events(reference)[-1]["wall_seconds"])
        killed = number = 0
        while killed < num_kills:
            chain = Chain(training, place / f"run-{number}", launcher, draw, seconds, starting)
            while killed < num_kills and not chain.kill_once():
                killed += 1
                assert_way_back(chain.run)
            # Where it is done already, the start says so.
            assert launcher(training, chain.run).wait() == 0, log_of(chain.run).read_text()[-3000:]
            assert_as_undisturbed(chain.run, reference, training.steps)
            number += 1

    name = f"{layout}, {precision}: {num_kills} kills of {launcher.__name__} processes at random moments"
    return Case(name, "SIGKILL of one rank or of all, from the start to the end of a run", SAME, act, num_kills, tier)


def refused_save(
    name: str, kept: int, layout: str, tier: str, triggers: Sequence[Trigger] = (), said: str = "", **extra: str
) -> Case:
    """The operating system refuses in a save: the run ends on all ranks alike, says so once, and can be continued.

    Args:
        name: Of the case.
        kept: The step of the checkpoint that stays.
        layout: Of the run.
        tier: Of the case.
        triggers: Where it refuses.
        said: Part of the message.
        extra: Environment variables.
    """

    def act(bench: Bench, place: Path) -> None:
        waits = ("checkpoint.asynchronous=false",) if extra else ()
        training, run = bench.training(layout, *waits, **FIELDS), place / "run"
        if extra:
            # Earlier saves may write as much as they want.
            start(training, run, code=-signal.SIGKILL, triggers=[Trigger(STEP, kept + 1)])
        output = start(training, run, resume=run.exists(), code=ExitCode.CHECKPOINT_FAILED, triggers=triggers, **extra)
        assert_save_refused(output, run, said or "No space left on device")
        assert assert_way_back(run) == kept, "the one before is as it was"
        bench.finish(training, run)

    return Case(name, f"{said or 'ENOSPC'} in a save", REFUSED, act, tier=tier, kinds={FULL_DISK: 1})


REFUSED = (
    "all ranks end with code 4 after the same step, one message says why, the continued run is the undisturbed one"
)


KEPT_ON = "the run continues and says so once; the next save removes what is left"


def assert_save_refused(output: str, run: Path, *parts: str) -> None:
    """Fails unless one message names these things, and nothing half-written is left."""
    assert output.count("stopped: ") == 1
    assert_refused(output[output.index("stopped: ") :], *parts)
    assert not list((run / "checkpoints").glob(".unfinished*")), "what was half written is gone"
    stopped = events(run)[-1]
    assert stopped["event"] == "stopped" and stopped["exit_code"] == ExitCode.CHECKPOINT_FAILED
    assert list(curve(run, "loss")) == list(range(1, stopped["step"] + 1))


def folder_missing(bench: Bench, place: Path) -> None:
    """A link that leads nowhere stands where the checkpoints should go: what refuses root as well."""
    training, run = bench.training("zero1-dp2", **FIELDS), place / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(place / "a disk that is not mounted" / "checkpoints")
    output = start(training, run, code=ExitCode.CHECKPOINT_FAILED)
    assert_save_refused(output, run, str(run / "checkpoints"))
    assert events(run)[-1]["step"] == EVERY
    (run / "checkpoints").unlink()
    bench.finish(training, run)


def not_removed(bench: Bench, place: Path) -> None:
    """An earlier checkpoint cannot be removed: the new one is none the worse."""
    training, run = bench.training("zero1-dp2", **FIELDS), place / "run"
    output = start(training, run, triggers=[Trigger("point retention", 1, **FULL)])
    assert output.count("the checkpoint is complete, but of earlier ones") == 1 and "No space left on device" in output
    assert [event["step"] for event in events(run) if event["event"] == "not_removed"] == [2 * EVERY]
    assert_as_undisturbed(run, bench.reference(training), training.steps)


def in_turn() -> list[Trigger]:
    """One kill at every point, in the second save, the ranks taking turns where all of them pass it."""
    kills = kills_at_points(2, saves=(2,))
    by_point = [[kill for kill in kills if kill.event == f"point {point}"] for point in FAILPOINTS]
    return [same[place % len(same)] for place, same in enumerate(by_point)]


SCHEDULES = (("pipeline2", (1, 2)), ("zero3-dp2", (1, 2)), ("tp2pp2", (2,)))
"""Layouts, and the saves in which their ranks die."""
CASES = (
    *(killed_save("pipeline2", kill, forked, "" if kill.event == "point mid-file" else "slow") for kill in in_turn()),
    killed_save("pipeline2", Trigger("point mid-file", 1, rank=1), forked, "slow"),
    random_kills("zero3-dp2", "bf16", 3, forked, starting=1.0, tier="slow", steps=24, every=3),
    *(
        killed_save(layout, kill, real, "nightly")
        for layout, saves in SCHEDULES
        for kill in kills_at_points(LAYOUTS[layout][0], saves)
    ),
    *(
        random_kills(layout, precision, num_kills, real, starting=12.0, tier="nightly", steps=60, every=3)
        for layout, precision, num_kills in (
            ("pipeline2", "fp32", 25),
            ("zero3-dp2", "fp32", 25),
            ("tp2pp2", "bf16", 5),
            ("zero3-tp2dp2", "bf16", 5),
        )
    ),
    refused_save("no space in a file", 2, "zero1-dp2", "slow", [Trigger("point mid-file", 2, rank=1, **FULL)]),
    refused_save("no space before the rename", 2, "zero1-dp2", "slow", [Trigger("point before-rename", 2, **FULL)]),
    Case(
        "no space in retention",
        "ENOSPC when a checkpoint is removed",
        KEPT_ON,
        not_removed,
        tier="slow",
        kinds={FULL_DISK: 1},
    ),
    refused_save("a limit on file sizes", 2, "zero1-dp2", "slow", said="File too large", FILE_LIMIT="100000"),
    Case("no folder of checkpoints", "a link that leads nowhere", REFUSED, folder_missing, tier="slow"),
)
