"""The disk refuses: the run ends on all ranks on one step, says what to do, and nothing that was good is lost."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.retention import checkpoint_name
from mlra_scale.training.exit_codes import ExitCode
from tests.faults.checks import Training, assert_as_undisturbed, assert_way_back
from tests.faults.dying import LIMIT_VARIABLE, Fault
from tests.faults.every_point import training_of, undisturbed
from tests.faults.launching import Forked
from tests.support.training_runs import curve, events


@pytest.fixture(scope="module")
def training(training_data: Path) -> Training:
    return training_of(training_data, "zero1-dp2")


@pytest.fixture(scope="module")
def reference(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(training, tmp_path_factory.mktemp("disk") / "undisturbed", Forked)


@pytest.fixture
def small_disk(tmp_path: Path, reference: Path) -> Iterator[Path]:
    """A disk of its own with room for one checkpoint and a half."""
    size = sum(path.stat().st_size for path in (reference / "checkpoints").rglob("*") if path.is_file())
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={3 * size // 2}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs (the test of a file size limit stands in for it)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fails(
    training: Training, run: Path, resume: bool = False, fault: Fault | None = None, file_limit: int | None = None
) -> str:
    """Trains, with a save that fails; returns what was said of it."""
    limit = {} if file_limit is None else {LIMIT_VARIABLE: str(file_limit)}
    launch = Forked(training.arguments(run, resume), training.num_ranks, run.with_suffix(".log"), fault, **limit)
    assert not launch.wait(120.0)
    assert launch.codes == [ExitCode.CHECKPOINT_FAILED] * training.num_ranks, launch.output()[-3000:]
    output = launch.output()
    assert output.count("stopped: ") == 1 and "Traceback" not in output
    assert not list((run / "checkpoints").glob(".unfinished*")), "what was half written is gone"
    return output[output.index("stopped: ") :]


def goes_on(training: Training, run: Path, reference: Path) -> None:
    launch = Forked(training.arguments(run, resume=True), training.num_ranks, run.with_suffix(".log"))
    assert launch.wait(120.0), launch.output()[-3000:]
    assert_as_undisturbed(run, reference, training.steps)


def test_a_disk_that_fills_up(training: Training, reference: Path, small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    told = fails(training, run)
    assert "No space left on device" in told and "checkpoint.keep_last" in told and "--resume auto" in told
    stopped = events(run)[-1]
    assert stopped["event"] == "stopped" and stopped["exit_code"] == ExitCode.CHECKPOINT_FAILED
    assert list(curve(run, "loss")) == list(range(1, stopped["step"] + 1))
    assert assert_way_back(run) == 2, "the one before is as it was"
    size = f"remount,size={10 * os.statvfs(small_disk).f_blocks * os.statvfs(small_disk).f_frsize}"
    subprocess.run(["mount", "-o", size, str(small_disk)], check=True)
    goes_on(training, run, reference)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(training: Training, reference: Path, tmp_path: Path) -> None:
    """As a quota does: the second half of the run may write no file as large as a rank's."""
    run = tmp_path / "run"
    half = Training(training.data, training.layout, 2, training.every, 1, more=("optim.schedule=constant",))
    whole = Training(training.data, training.layout, 6, training.every, 1, more=half.more)
    undisturbed(half, run, Forked)
    told = fails(whole, run, resume=True, file_limit=100_000)
    assert "File too large" in told
    assert assert_way_back(run) == 2
    goes_on(whole, run, undisturbed(whole, tmp_path / "whole", Forked))


@pytest.mark.slow
@pytest.mark.parametrize(("point", "rank", "kept"), [("mid-file", 1, 2), ("before-rename", 0, 2), ("retention", 0, 4)])
def test_a_fault_anywhere_in_a_save_ends_all_ranks_alike(
    training: Training, reference: Path, tmp_path: Path, point: str, rank: int, kept: int
) -> None:
    run = tmp_path / "run"
    told = fails(training, run, fault=Fault(point, rank, 1 if point == "retention" else 2, "fail"))
    assert "No space left on device" in told
    assert assert_way_back(run) == kept
    goes_on(training, run, reference)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(training: Training, reference: Path, tmp_path: Path) -> None:
    """A link that leads nowhere stands where the checkpoints should go: what refuses root as well."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "a disk that is not mounted" / "checkpoints")
    told = fails(training, run)
    assert str(run / "checkpoints") in told and events(run)[-1]["step"] == 2
    (run / "checkpoints").unlink()
    goes_on(training, run, reference)


@pytest.mark.slow
def test_a_disk_that_is_still_full_at_the_next_start(training_data: Path, small_disk: Path) -> None:
    """Rank 0 alone writes before the first step; the other rank learns what stands in the way."""
    run, log = small_disk / "run", small_disk.with_suffix(".log")
    undisturbed(Training(training_data, "zero1-dp2", 2, 2, 1), run, Forked)
    before = (run / "metrics.jsonl").read_bytes()
    with contextlib.suppress(OSError), (small_disk / "other people's files").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    training = Training(training_data, "zero1-dp2", 4, 2, 1)
    launch = Forked(training.arguments(run, resume=True), training.num_ranks, log)
    assert not launch.wait(120.0)
    assert launch.codes == [ExitCode.BAD_INPUT] * 2, launch.output()[-3000:]
    output = launch.output()
    assert output.count("No space left on device; mend that") == 1 and "Traceback" not in output
    assert (run / "metrics.jsonl").read_bytes() == before and assert_way_back(run) == 2


def test_a_disk_that_became_read_only(training_data: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    training = Training(training_data, "single", 2, 2, 1)
    undisturbed(training, run, Forked)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    launch = Forked(training.arguments(run, resume=True), training.num_ranks, small_disk.with_suffix(".log"))
    assert not launch.wait(120.0)
    assert launch.codes == [ExitCode.BAD_INPUT] and "cannot be written; name another directory" in launch.output()
    assert Store.open(run / "checkpoints" / checkpoint_name(2)).verify() == []
