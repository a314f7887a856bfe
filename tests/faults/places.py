"""Disturbances: run directories that vanish, move or are shared, and disks that are full or read-only."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mlra_scale.training.exit_codes import ExitCode
from tests.faults.bench import DISK, FLAT, Bench, assert_sound, program, start
from tests.faults.case import FULL, SAME, Case, assert_refused, run_to_end
from tests.faults.kills import STEP, prepared, same_data, trained
from tests.faults.saves import assert_save_refused
from tests.faults.stops import LONG, step_of, trains
from tests.faults.training import assert_as_undisturbed
from tests.faults.triggers import Trigger
from tests.support.processes import TRAIN, Program, tool
from tests.support.training_runs import events

NOTICED = "the run stops at its next checkpoint, not with 0, in one message that names what is gone"
GONE = ("is gone: it has been moved or removed", "nothing else may move them during a run")
RECORD = ("metrics.jsonl", "events.jsonl")


def displaced(
    name: str,
    done: str,
    act: Callable[[Path], Path | None],
    layout: str = "single",
    is_kept: bool = True,
    said: Sequence[str] = ("",),
    tier: str = "nightly",
) -> Case:
    """Something is done to the run directory of a running run.

    Args:
        name: Of the case.
        done: What is done, in words.
        act: Does it; returns where the run is then, if it is.
        layout: Of the run.
        is_kept: Whether it is somewhere.
        said: Parts of the message, of which it has one: a save that is under way names what it cannot write.
        tier: Of the case.
    """

    def do(bench: Bench, place: Path) -> None:
        training = bench.training(layout, *FLAT, steps=LONG, every=40)
        run = place / "run"
        launch = program(training, run)
        trains(launch, run, 45)
        left = act(run)
        exists = run.exists()
        code, output = launch.wait(), launch.output()
        assert code == (ExitCode.CHECKPOINT_FAILED if training.num_ranks == 1 else 1), output[-2000:]
        assert output.count("stopped: ") == 1, output[-1000:]
        message = output[output.index("stopped: ") :]
        # What torchrun says of its ranks is its own.
        assert_refused(message if training.num_ranks == 1 else message.splitlines()[0], str(run))
        assert any(part in message for part in said), message
        assert run.exists() == exists, "nothing is put in its place"
        assert (left is not None) == is_kept
        if left is not None:
            assert str(left) + " now" in message or exists, "where it is now"
            assert events(left)[-1]["event"] == "stopped"
            step = assert_sound(left)
            assert step >= 40
            bench.finish(replace(training, steps=step + 2, every=40), left)

    promise = f"{NOTICED}{', and what it has kept continues as if undisturbed' * is_kept}"
    return Case(name, done, promise, do, tier=tier)


def deleted(run: Path) -> None:
    """Removes it."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run, ignore_errors=True)


def moved(run: Path) -> Path:
    """Renames it."""
    return run.rename(run.with_name("moved"))


def replaced(run: Path) -> Path:
    """Renames it, and makes another."""
    moved_to = moved(run)
    run.mkdir()
    return moved_to


def record_replaced(run: Path) -> None:
    """Another file under the name of the record, as a rotation of logs leaves it."""
    (run / "metrics.jsonl").rename(run / "metrics.jsonl.1")
    (run / "metrics.jsonl").touch()


def two_at_once(bench: Bench, place: Path) -> None:
    """Two runs in one run directory at the same trigger."""
    training, run = bench.training(), place / "run"
    launches = [Program([*TRAIN, *training.arguments(run)], place / f"run-{number}.log") for number in range(2)]
    codes = [launch.wait() for launch in launches]
    assert sorted(codes) == [0, 2], codes
    assert_refused(launches[codes.index(2)].output(), str(run))
    assert_as_undisturbed(run, bench.reference(training), training.steps)


@contextlib.contextmanager
def disk(place: Path, size: int, options: str = "") -> Iterator[Path]:
    """A disk of its own, of so many bytes."""
    folder = place / DISK
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount_missing() -> str | None:
    """Why no disk can be mounted; None if one can."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            return "the right to mount a tmpfs (the case of a limit on file sizes stands in for it)"
        subprocess.run(["umount", folder], check=True)
    return None


def resize(folder: Path, size: int | str) -> None:
    """Changes the size of such a disk, or other options."""
    option = f"size={size}" if isinstance(size, int) else size
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Fills a disk up to some bytes."""
    file = folder / "somebody else's"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    if left:
        os.truncate(file, max(0, file.stat().st_size - left))
    return file


def size_of(run: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def full_at_save(bench: Bench, place: Path) -> None:
    """The disk has room for the first checkpoint only."""
    training = bench.training("zero1-dp2")
    size = size_of(bench.reference(training) / "checkpoints") // 2
    with disk(place, size + size // 2 + (1 << 18)) as folder:
        run = folder / "run"
        output = start(training, run, code=4)
        assert_save_refused(output, run, "No space left on device", "checkpoint.keep_last", "--resume auto")
        assert assert_sound(run) == 2
        resize(folder, 10 * size)
        bench.finish(training, run)


def full_at_record(bench: Bench, place: Path) -> None:
    """The disk fills up while nothing but the record is written, and is emptied before the save."""
    training = bench.training("single", *FLAT, steps=LONG, every=200)
    with disk(place, 64 << 20) as folder:
        run = folder / "run"
        launch = program(training, run)
        trains(launch, run)
        file = fill(folder)
        before = step_of(run)
        trains(launch, run, before)
        # The record says nothing of it, the console does.
        launch.wait_until(lambda: "No space left on device" in launch.output() or step_of(run) >= 195)
        file.unlink()
        launch.wait_until(lambda: any(event["event"] == "checkpoint" for event in events(run)))
        launch.signal(15)
        assert launch.wait() == 5, launch.output()[-2000:]
        bench.finish(replace(training, steps=assert_sound(run) + 2), run)


def full_at_start(bench: Bench, place: Path) -> None:
    """A run is to be continued on a full disk: rank 0 alone writes, and the other rank learns the reason."""
    training = bench.training("zero1-dp2")
    with disk(place, 64 << 20) as folder:
        run = folder / "run"
        start(training, run, code=-9, triggers=(Trigger(STEP, 5),))
        file = fill(folder)
        before = [(run / name).read_bytes() for name in RECORD]
        output = start(training, run, resume=True, code=2)
        assert output.count("No space left on device; mend that") == 1
        assert_refused(output[output.index("stopped: ") :], "No space left on device", str(run))
        # The refusal itself may be an event.
        assert (run / "metrics.jsonl").read_bytes() == before[0]
        assert (run / "events.jsonl").read_bytes().startswith(before[1])
        file.unlink()
        bench.finish(training, run)


def full_for_tool(name: str, command: Callable[[Bench, Path], list[str]], same: Callable[[Path, Path], None]) -> Case:
    """A tool writes to a disk without room."""

    def act(bench: Bench, place: Path) -> None:
        good = place / "good" / "out"
        run_to_end(command(bench, good), place / "good.log")
        with disk(place, 16 << 20) as folder:
            file = fill(folder, 64 << 10)
            output = run_to_end(command(bench, folder / "out"), place / "full.log", code=2)
            assert_refused(output, "No space left on device", "out")
            assert list(folder.iterdir()) == [file], list(folder.iterdir())
            file.unlink()
            run_to_end(command(bench, folder / "out"), place / "full.log")
            same(folder / "out", good)

    promise = "exit code 2, one message, nothing is left there"
    return Case(name, "the disk of its output is full", promise, act, needs="mount", kinds={FULL: 1})


def read_only(bench: Bench, place: Path) -> None:
    """The disk became read-only between two starts."""
    training = bench.training()
    with disk(place, 64 << 20) as folder:
        run = folder / "run"
        start(training, run, code=-9, triggers=(Trigger(STEP, 5),))
        resize(folder, "ro")
        output = start(training, run, resume=True, code=2)
        assert_refused(output[output.index("bad input") :], str(run), "cannot be written; name another directory")
        assert_sound(run)
        resize(folder, "rw")
        bench.finish(training, run)


def linked(bench: Bench, place: Path) -> None:
    """A link that leads to the run directory is what every start names."""
    training, link = bench.training(), place / "link"
    (place / "run").mkdir()
    link.symlink_to(place / "run")
    start(training, link, code=-9, triggers=(Trigger(STEP, 5),))
    link.unlink()
    (place / "run").rename(place / "elsewhere")
    link.symlink_to(place / "elsewhere")
    bench.finish(training, link)


REFUSED = "exit code 2, one message that names the directory and the reason, the record is as it was; then the same run"
CASES = (
    displaced(
        "run directory deleted", "rm -r of the run directory under a run", deleted, is_kept=False, said=GONE, tier=""
    ),
    displaced("run directory moved", "mv of the run directory under a run", moved, said=GONE, tier="slow"),
    displaced("run directory moved, torchrun", "as before, two ranks under torchrun", moved, "zero1-dp2"),
    displaced("run directory replaced", "mv, and an empty directory in its place", replaced),
    displaced("record replaced", "mv of metrics.jsonl, and an empty file in its place", record_replaced, is_kept=False),
    Case("two runs at once", "two commands at once in one new run directory", "one is refused", two_at_once),
    Case("a linked run directory", "it is a link, and moves between two starts", SAME, linked),
    Case(
        "disk full at a save",
        "a tmpfs that holds one checkpoint",
        SAME,
        full_at_save,
        tier="",
        needs="mount",
        kinds={FULL: 1},
    ),
    Case(
        "disk full at the record", "a tmpfs is filled under a run", SAME, full_at_record, needs="mount", kinds={FULL: 1}
    ),
    Case(
        "disk full at a start",
        "a tmpfs is full at a start",
        REFUSED,
        full_at_start,
        tier="slow",
        needs="mount",
        kinds={FULL: 1},
    ),
    Case("read-only run directory", "a tmpfs became read-only", REFUSED, read_only, tier="", needs="mount"),
    full_for_tool("disk full while preparing", prepared, same_data),
    full_for_tool(
        "disk full while exporting",
        lambda bench, output: [*tool("export_hf"), trained(bench), str(output)],
        lambda one, other: same_data(one, other),
    ),
)
