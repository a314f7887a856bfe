"""One lock, one atomic write and one rename into place for all rooms."""

import errno
import fcntl
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from mlra_scale import files
from mlra_scale.files import lock, native_errors, new_folder, partial_of, put_in_place, write_atomically

BUSY = RuntimeError("another process is at work")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def refuse(code: int) -> Callable[..., None]:
    def refused(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return refused


def test_a_lock_keeps_others_out_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as holder, path.open("w") as other:
        assert lock(holder.fileno()) is None
        with pytest.raises(BlockingIOError):
            lock(other.fileno())
        with pytest.raises(BlockingIOError):
            lock(other.fileno(), math.inf, should_stop=lambda: True)
        timer = threading.Timer(0.2, holder.close)
        timer.start()
        assert lock(other.fileno(), math.inf) is None
        timer.join()


def test_shared_locks_are_held_together(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as one, path.open() as other, path.open() as third:
        assert lock(one.fileno(), is_shared=True) is None and lock(other.fileno(), is_shared=True) is None
        with pytest.raises(BlockingIOError):
            lock(third.fileno())


def test_a_file_system_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with (tmp_path / "lock").open("w") as file:
        assert lock(file.fileno()) == "No locks available"


@pytest.mark.parametrize("call", ["os.replace", "os.fsync"])
def test_a_failed_write_leaves_the_old_content_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "latest"
    write_atomically(path, "step-1\n")
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left on device") as refused:
            write_atomically(path, "step-2\n")
    assert refused.value.filename == str(path), "and not its temporary file"
    assert path.read_text() == "step-1\n" and names(tmp_path) == ["latest"]
    write_atomically(path, b"step-3\n")
    assert path.read_text() == "step-3\n"


def test_a_full_disk_under_a_library_in_rust_is_an_error_of_the_system(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(OSError, match="No space left on device") as refused, native_errors(tmp_path):
        tokenizer.save("/dev/full")
    assert refused.value.errno == errno.ENOSPC and refused.value.filename == str(tmp_path)
    with pytest.raises(KeyError), native_errors(tmp_path):
        raise KeyError("another one")


@pytest.fixture(params=["exchange", "no exchange"])
def _exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a file system that can exchange two names."""
    if request.param == "no exchange":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("_exchange")
@pytest.mark.parametrize("old", ["folder", "dangling link", "nothing"])
def test_what_is_in_the_way_is_moved_aside(tmp_path: Path, old: str) -> None:
    new, target, aside = (tmp_path / name for name in ("new", "target", "aside"))
    new.mkdir()
    (new / "file").touch()
    if old == "folder":
        target.mkdir()
    elif old == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    is_replacing = put_in_place(new, target, aside)
    assert names(target) == ["file"] and is_replacing == (old != "nothing")
    assert names(tmp_path) == (["aside", "target"] if is_replacing else ["target"])


@pytest.mark.usefixtures("_exchange")
def test_a_failed_replacement_is_undone(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "nothing", tmp_path / "target", tmp_path / "aside")
    assert names(tmp_path) == ["target"]


def build(target: Path, content: str) -> None:
    with new_folder(target, BUSY) as folder:
        assert not names(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(content)


@pytest.mark.usefixtures("_exchange")
def test_a_folder_appears_whole_and_replaces_an_older_one(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "set"
    for content in ("one", "two"):
        build(target, content)
        assert (target / "sub" / "file").read_text() == content and names(target.parent) == ["set"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    build(tmp_path / "disk", "one")
    (tmp_path / "set").symlink_to("disk")
    build(tmp_path / "set", "two")
    assert names(tmp_path) == ["disk", "set"] and not (tmp_path / "set").is_symlink()
    assert [(tmp_path / name / "sub" / "file").read_text() for name in ("disk", "set")] == ["one", "two"]
    (tmp_path / "lost").symlink_to("not mounted")
    with pytest.raises(FileNotFoundError, match="link to a place that is not there"):
        build(tmp_path / "lost", "three")
    assert names(tmp_path) == ["disk", "lost", "set"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_neither_folder_nor_parents(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "a" / "set", BUSY) as folder:
        (folder / "file").touch()
        raise error
    assert not names(tmp_path)


def test_remainders_of_killed_builders_are_cleared_away(tmp_path: Path) -> None:
    target, partial, old = tmp_path / "set", tmp_path / ".set.partial", tmp_path / ".set.old"
    (partial / "sub").mkdir(parents=True)
    (partial / "half").touch()
    build(old, "older")  # killed between its two renames: the old one is put back
    with pytest.raises(ValueError, match="stop"), new_folder(target, BUSY):
        raise ValueError("stop")
    assert (target / "sub" / "file").read_text() == "older" and names(tmp_path) == ["set"]
    build(old, "older")  # killed after them
    build(target, "new")
    assert (target / "sub" / "file").read_text() == "new" and names(tmp_path) == ["set"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_an_earlier_builder_left_is_kept_where_its_successor_says_so(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "a" / "set"

    def is_kept(folder: Path) -> bool:
        return (folder / "progress").exists()

    for step in ("progress", "more"):  # the first builder begins, the second one adds, the third one finishes
        with pytest.raises(error), new_folder(target, BUSY, is_kept) as folder:
            (folder / step).touch()
            raise error
    with new_folder(target, BUSY, is_kept) as folder:
        assert folder == partial_of(target) and names(folder) == ["more", "progress"]
    assert names(target.parent) == ["set"]
    with new_folder(target, BUSY, is_kept) as folder:
        assert names(folder) == []


def test_two_builders_do_not_meet(tmp_path: Path) -> None:
    with new_folder(tmp_path / "set", BUSY) as folder:
        (folder / "file").touch()
        with pytest.raises(RuntimeError, match="another process is at work"):
            build(tmp_path / "set", "two")
    assert names(tmp_path / "set") == ["file"]
    build(tmp_path / "set", "the lock is gone with its holder")
