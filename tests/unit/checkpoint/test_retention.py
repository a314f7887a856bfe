"""Which checkpoints stay."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.checkpoint import (
    CheckpointError,
    Store,
    checkpoint_at,
    checkpoint_name,
    complete_checkpoints,
    failpoints,
    latest,
    newest_complete,
    prune,
    retention,
)
from mlra_scale.checkpoint.retention import (
    checkpoint_folders,
    prunable,
    remove_after,
    set_latest,
    tidy,
)
from tests.unit.checkpoint.builders import write_checkpoint


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in paths]


def write(folder: Path, *numbers: int) -> None:
    for step in numbers:
        write_checkpoint(folder, step)


def refusing(code: int, only: str = "") -> Callable[..., None]:
    """An rmtree that refuses folders whose name has a text in it."""
    rmtree = shutil.rmtree

    def remove(path: Path, **options: Any) -> None:
        if only in path.name:
            raise OSError(code, os.strerror(code), str(path))
        rmtree(path, **options)

    return remove


def test_nothing_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert complete_checkpoints(folder) == [] and newest_complete(folder) is None and latest(folder) is None
        assert prune(folder, 1, 0) == []


def test_a_path_means_a_checkpoint_or_the_newest_complete_one_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "checkpoints", 5, 10)
    older, newer = (run / "checkpoints" / checkpoint_name(step) for step in (5, 10))
    for path in (run, run / "checkpoints", newer):
        assert checkpoint_at(path) == newer
    assert checkpoint_at(older) == older
    # Incomplete ones are ignored, under a checkpoint's name as under that of a save in progress.
    shutil.copytree(newer, run / "checkpoints" / ".unfinished-step-00000015")
    (newer / "manifest.json").unlink()
    assert checkpoint_at(run) == older
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for path in (tmp_path / "empty", tmp_path / "empty" / "checkpoints"):
        with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
            checkpoint_at(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint_at(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "pinned", "kept"),
    [
        (2, 30, None, [30, 60, 70]),
        (2, 0, None, [60, 70]),
        (1, 0, 20, [20, 70]),
        (1, 0, 99, [70]),  # one that is not there pins nothing
    ],
)
def test_the_last_ones_every_so_many_and_a_pinned_one_are_kept(
    tmp_path: Path, keep_last: int, keep_every: int, pinned: int | None, kept: list[int]
) -> None:
    written = range(10, 80, 10)
    write(tmp_path, *written)
    assert steps(complete_checkpoints(tmp_path)) == [*written]
    removed = [step for step in written if step not in kept]
    assert steps(prunable(tmp_path, keep_last, keep_every, pinned)) == removed
    assert steps(prune(tmp_path, keep_last, keep_every, pinned)) == removed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *map(checkpoint_name, kept)]


def test_incomplete_and_renamed_ones_do_not_count_and_what_latest_names_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5)
    best = Path(shutil.copytree(tmp_path / checkpoint_name(2), tmp_path / "step-00000002-best"))
    for step in (4, 5):
        (tmp_path / checkpoint_name(step) / "rank-00000.safetensors").unlink()
    set_latest(tmp_path, tmp_path / checkpoint_name(1))
    assert latest(tmp_path) == tmp_path / checkpoint_name(1)
    assert newest_complete(tmp_path) == tmp_path / checkpoint_name(3)
    assert steps(prune(tmp_path, 1, 0)) == [2]
    names = sorted([*map(checkpoint_name, (1, 3, 4, 5)), best.name])
    assert [path.name for path in checkpoint_folders(tmp_path)] == names
    assert Store.open(best).verify() == []


def test_of_undone_steps_nothing_stays(tmp_path: Path) -> None:
    """Else they would be the newest ones: what is saved from then on would make room for them."""
    write(tmp_path, 30, 40, 42, 44, 46)
    (tmp_path / checkpoint_name(44) / "rank-00000.safetensors").unlink()
    shutil.copytree(tmp_path / checkpoint_name(46), tmp_path / "step-00000046-best")
    set_latest(tmp_path, tmp_path / checkpoint_name(40))
    assert steps(remove_after(tmp_path, 40)) == [42, 44, 46]
    names = ["latest", *map(checkpoint_name, (30, 40)), "step-00000046-best"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    write_checkpoint(tmp_path, 42)
    assert steps(prune(tmp_path, 2, 0)) == [30] and remove_after(tmp_path, 42) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"step-00000007\n", "step-00000007"),
        (b"../etc/x", "x"),
        (b"\xff\xfe", "latest"),
        (b"", "latest"),
        (None, "latest"),
    ],
    ids=["names none", "leads out", "no text", "empty", "a folder"],
)
def test_a_damaged_pointer_leads_to_no_checkpoint(tmp_path: Path, content: bytes | None, expected: str) -> None:
    write(tmp_path, 1)
    (tmp_path / "latest").unlink()
    if content is None:
        (tmp_path / "latest").mkdir()
    else:
        (tmp_path / "latest").write_bytes(content)
    found = latest(tmp_path)
    assert found is not None and found == tmp_path / expected
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        Store.open(found)
    assert newest_complete(tmp_path) == tmp_path / checkpoint_name(1)


def move_away(checkpoint: Path, to: Path) -> None:
    """What people do when a disk is nearly full."""
    shutil.move(checkpoint, to)
    checkpoint.symlink_to(to)


def test_of_a_checkpoint_that_was_moved_away_the_link_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, 1, 2)
    for step in (1, 2):
        move_away(folder / checkpoint_name(step), tmp_path / f"kept-{step}")
    assert steps(complete_checkpoints(folder)) == [1, 2]
    assert steps(prune(folder, 1, 0)) == [1]
    write(folder, 2)  # takes the place of the link
    assert sorted(path.name for path in folder.iterdir()) == ["latest", checkpoint_name(2)]
    assert not (folder / checkpoint_name(2)).is_symlink()
    assert all(Store.open(tmp_path / f"kept-{step}").verify() == [] for step in (1, 2))


def test_what_is_still_in_use_is_cleared_away_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS the folder of a file that another process reads cannot be removed."""
    write(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refusing(errno.ENOTEMPTY))
        for _ in range(2):
            assert steps(prune(tmp_path, 1, 0)) == [1]
            tidy(tmp_path)
            assert steps(checkpoint_folders(tmp_path)) == [2]
            write(tmp_path, 1)
            set_latest(tmp_path, tmp_path / checkpoint_name(2))
            write(tmp_path, 2)
    assert len(list(tmp_path.glob(f"{retention.REMOVED}*"))) == 4
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *map(checkpoint_name, (1, 2))]


def test_what_is_half_removed_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 2)

    def reached(point: str) -> None:
        assert point == "retention"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(failpoints, "reached", reached)
        prune(tmp_path, 1, 0)
    assert steps(checkpoint_folders(tmp_path)) == [2]
    assert (tmp_path / ".removed-step-00000001").is_dir()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_one_that_was_being_replaced_is_found_and_put_back(tmp_path: Path) -> None:
    """Killed between the two renames."""
    write(tmp_path, 1, 2)
    before = Store.open(tmp_path / checkpoint_name(2)).manifest
    replaced = tmp_path / ".replaced-step-00000002"
    (tmp_path / checkpoint_name(2)).rename(replaced)
    (tmp_path / ".unfinished-step-00000002").mkdir()
    assert newest_complete(tmp_path) == replaced
    assert Store.open(replaced).verify() == []
    tidy(tmp_path)
    assert Store.open(tmp_path / checkpoint_name(2)).manifest == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *map(checkpoint_name, (1, 2))]


def test_a_clock_that_goes_backwards_does_not_change_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(["2026-05-01T12:00:00.999999+00:00", "2026-05-01T11:00:00.000000+00:00"])
    monkeypatch.setattr(retention, "now", lambda: next(times))
    write(tmp_path, 20, 10)
    assert steps(complete_checkpoints(tmp_path)) == [20, 10]
    assert Store.open(tmp_path / checkpoint_name(10)).manifest.created == "2026-05-01T12:00:01.000000+00:00"


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOENT, errno.EACCES, errno.EIO])
def test_a_complete_save_does_not_fail_for_what_cannot_be_removed(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS has its own reasons; the rest is as removable as before."""
    write(tmp_path, 1, 2, 3)
    faults: list[Any] = []
    monkeypatch.setattr(shutil, "rmtree", refusing(code, "00000001"))
    final = write_checkpoint(tmp_path, 4, keep_last=1, faults=faults)
    assert latest(tmp_path) == final and Store.open(final).verify() == []
    assert steps(complete_checkpoints(tmp_path)) == [4], "2 and 3 are gone, 1 is hidden"
    is_reported = code in (errno.EACCES, errno.EIO)
    assert [os.strerror(code) in fault and "00000001" in fault for fault in faults if fault] == [True] * is_reported
    tidy(tmp_path)  # the next save's first act: what is in the way does not keep it from being made
    write(tmp_path, 5)


def test_a_replaced_save_that_cannot_be_cleared_away_is_no_fault_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refusing(errno.EIO))
        write(tmp_path, 1)
    assert steps(complete_checkpoints(tmp_path)) == [1]
