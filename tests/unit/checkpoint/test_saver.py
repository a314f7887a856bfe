"""The saver on one rank: what is visible when, what a failure leaves, and what it costs."""

import errno
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlra_scale.checkpoint import CheckpointError, Saver, Store, complete_checkpoints, failpoints, latest
from mlra_scale.checkpoint.failpoints import FAILPOINTS
from mlra_scale.parallel.fragments import Fragment
from tests.unit.checkpoint.builders import FakeEngine, Layout, all_parts, config_of

ONE = Layout()


def engine_of(group: Any, seed_of_change: float = 0.0) -> Any:
    engine = FakeEngine(ONE.topology(0, group), ONE, all_parts())
    change(engine, seed_of_change)
    return engine


def change(engine: Any, amount: float) -> None:
    """What training does to the values."""
    if engine.before_change is not None:
        engine.before_change()
    for fragment in engine.fragments:
        for values in (fragment.values, fragment.exp_avg, fragment.exp_avg_sq):
            values.add_(amount)


def saver_of(folder: Path, group: Any, keep_last: int = 10, asynchronous: bool = True) -> Saver:
    return Saver(folder, ONE.topology(0, group), keep_last, 0, asynchronous)


def save(saver: Saver, engine: Any, step: int, **options: Any) -> None:
    state = {"progress": {"step": step}, "engine": None}
    saver.save(engine, step, state, options.pop("buffers", {}), config_of().to_yaml(), None, **options)


@contextmanager
def held_at(monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[threading.Event]:
    """Lets whoever reaches a point wait there until the event is set."""
    release = threading.Event()

    def reached(point: str) -> None:
        if point == where:
            assert release.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "reached", reached)
        try:
            yield release
        finally:
            release.set()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, saver = engine_of(one_process), saver_of(tmp_path, one_process)
    expected = all_parts()
    buffers = {"v": torch.ones(3)}
    with held_at(monkeypatch, "mid-file") as release:
        save(saver, engine, 1, buffers=buffers)
        change(engine, 1.0)
        buffers["v"].zero_()
        for _ in range(3):
            assert saver.poll() == []
        assert visible(tmp_path) == [] and latest(tmp_path) is None
        release.set()
        (finished,) = saver.finish()
    assert finished.path == tmp_path / "step-00000001" == latest(tmp_path)
    store = Store.open(finished.path)
    assert store.verify() == []
    assert finished.step == store.step == 1
    assert finished.bytes == store.manifest.total_bytes
    assert min(finished.stall_seconds, finished.write_seconds) > 0.0
    assert store.state == {"progress": {"step": 1}, "engine": None}
    assert torch.equal(store.buffers()["v"], torch.ones(3))
    for part, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(store.tensor(name, part), tensor)  # type: ignore[arg-type]
    assert (saver.poll(), saver.finish(), hidden(tmp_path)) == ([], [], [])


def test_an_update_waits_until_its_values_are_copied(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, saver = engine_of(one_process), saver_of(tmp_path, one_process)
    with held_at(monkeypatch, "copy") as release:
        save(saver, engine, 1)
        assert saver.poll() == []
        update = threading.Thread(target=change, args=(engine, 1.0), daemon=True)
        update.start()
        update.join(0.2)
        assert update.is_alive()
        release.set()
        update.join(30)
        assert not update.is_alive() and engine.before_change is None
    (finished,) = saver.finish()
    assert finished.stall_seconds >= 0.2
    for part, tensors in all_parts().items():
        for name, tensor in tensors.items():
            assert torch.equal(Store.open(finished.path).tensor(name, part), tensor)  # type: ignore[arg-type]


def test_an_update_does_not_wait_for_a_copy_that_failed(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, saver = engine_of(one_process), saver_of(tmp_path, one_process)
    monkeypatch.setattr(failpoints, "reached", failing("copy", RuntimeError("a fault of the device")))
    save(saver, engine, 1)
    change(engine, 1.0)
    with pytest.raises(CheckpointError, match="rank 0: RuntimeError: a fault of the device"):
        saver.finish()


def test_an_update_does_not_wait_for_a_save_that_has_failed_at_its_beginning(tmp_path: Path, one_process: Any) -> None:
    engine, saver = engine_of(one_process), saver_of(tmp_path, one_process)
    saver.save(engine, 1, {"not JSON": object()}, {}, config_of().to_yaml(), None)
    change(engine, 1.0)
    with pytest.raises(CheckpointError, match="rank 0: TypeError"):
        saver.finish()


def test_polling_is_enough(tmp_path: Path, one_process: Any) -> None:
    saver = saver_of(tmp_path, one_process)
    save(saver, engine_of(one_process), 1)
    deadline = time.monotonic() + 30
    while not (finished := saver.poll()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [record.step for record in finished] == [1]


def test_one_save_is_in_flight_and_host_memory_is_used_again(tmp_path: Path, one_process: Any) -> None:
    engine, saver = engine_of(one_process), saver_of(tmp_path, one_process)
    addresses = set()
    for step in (1, 2, 3):
        save(saver, engine, step)
        addresses.add(saver._memory.buffer.data_ptr())
        assert len(visible(tmp_path)) >= step - 1 + (step > 1)
    assert len(addresses) == 1
    assert [record.step for record in saver.finish()] == [1, 2, 3]
    assert saver._memory.buffer.numel() == sum(3 * fragment.values.numel() for fragment in engine.fragments)


def test_a_synchronous_save_takes_no_host_memory(tmp_path: Path, one_process: Any) -> None:
    engine = engine_of(one_process)
    for number, asynchronous in enumerate((False, True)):
        saver = saver_of(tmp_path, one_process, asynchronous=asynchronous)
        save(saver, engine, number, synchronous=asynchronous)
        assert (tmp_path / f"step-0000000{number}").is_dir()
        assert [record.step for record in saver.poll()] == [number]
        assert saver._memory.buffer.numel() == 0


def test_before_the_first_update_there_are_no_moments(tmp_path: Path, one_process: Any) -> None:
    engine: Any = FakeEngine(ONE.topology(0, one_process), ONE, {"weight": all_parts()["weight"]})
    saver = saver_of(tmp_path, one_process, asynchronous=False)
    save(saver, engine, 0)
    store = Store.open(tmp_path / "step-00000000")
    assert not store.manifest.has_moments and store.verify() == []


def test_a_save_of_the_same_step_takes_the_place_of_the_first(tmp_path: Path, one_process: Any) -> None:
    saver = saver_of(tmp_path, one_process)
    for amount in (0.0, 1.0):
        save(saver, engine_of(one_process, amount), 5)
    saver.finish()
    assert visible(tmp_path) == ["latest", "step-00000005"] and hidden(tmp_path) == []
    bias = Store.open(tmp_path / "step-00000005").tensor("final_norm.bias")
    assert torch.equal(bias, all_parts()["weight"]["final_norm.bias"] + 1.0)


def test_a_run_that_continues_from_an_earlier_step_keeps_its_own(tmp_path: Path, one_process: Any) -> None:
    """Of the abandoned branch the checkpoints are older, whatever their steps."""
    saver = saver_of(tmp_path, one_process, keep_last=2)
    for step in (10, 20, 30, 15, 25):
        save(saver, engine_of(one_process), step)
    saver.finish()
    assert visible(tmp_path) == ["latest", "step-00000015", "step-00000025"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000015", "step-00000025"]


def failing(where: str, error: Exception) -> Any:
    def reached(point: str) -> None:
        assert point in FAILPOINTS
        if point == where:
            raise error

    return reached


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("point", [point for point in FAILPOINTS if point not in ("agreed", "retention")])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch, point: str, asynchronous: bool
) -> None:
    """The disk is full at any point: one error, the disk is free again, earlier checkpoints are as they were."""
    saver = saver_of(tmp_path, one_process, keep_last=1, asynchronous=asynchronous)
    engine = engine_of(one_process)
    save(saver, engine, 1)
    saver.finish()
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device") as caught:
        patch.setattr(failpoints, "reached", failing(point, full))
        save(saver, engine, 2)
        saver.finish()
    assert "the save of step 2 failed: rank 0: " in str(caught.value)
    if point not in ("snapshot", "copy"):
        assert "free space on the disk" in str(caught.value)
    assert saver.poll() == []
    has_name = point == "before-latest"
    assert [path for path in hidden(tmp_path) if "unfinished" in path] == []
    complete = complete_checkpoints(tmp_path)
    assert [path.name for path in complete][-1] == f"step-0000000{1 + has_name}"
    assert latest(tmp_path) in complete
    assert all(Store.open(path).verify() == [] for path in complete)
    save(saver, engine, 3)
    assert [record.step for record in saver.finish()] == [3]
    assert visible(tmp_path) == ["latest", "step-00000003"] and hidden(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failure_of_retention_does_not_fail_the_save(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    saver = saver_of(tmp_path, one_process, keep_last=1, asynchronous=asynchronous)
    engine = engine_of(one_process)
    save(saver, engine, 1)
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "reached", failing("retention", OSError(errno.ESTALE, "Stale file handle")))
        save(saver, engine, 2)
        assert [record.step for record in saver.finish()] == [2]
    complete = complete_checkpoints(tmp_path)
    assert complete[-1].name == "step-00000002" and latest(tmp_path) == complete[-1]
    assert all(Store.open(path).verify() == [] for path in complete)
    save(saver, engine, 3)
    saver.finish()
    assert visible(tmp_path) == ["latest", "step-00000003"]


def test_two_runs_in_one_folder_do_not_mix_their_files(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a run directory is missing on some file systems, and a rank of a dead run may live on."""
    first, second = saver_of(tmp_path, one_process), saver_of(tmp_path, one_process)
    with held_at(monkeypatch, "file-open"):
        save(first, engine_of(one_process), 1)
        while not [*tmp_path.glob(".unfinished-*/rank-*")]:  # a folder that is being written to might not be removed
            time.sleep(0.001)
        save(second, engine_of(one_process, 1.0), 1)  # takes what the first one writes for leftovers
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        first.finish()
    assert [record.step for record in second.finish()] == [1]
    assert Store.open(tmp_path / "step-00000001").verify() == []
    assert visible(tmp_path) == ["latest", "step-00000001"] and hidden(tmp_path) == []


def test_a_file_that_rank_0_does_not_see(tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every machine writes to a disk of its own."""
    saver = saver_of(tmp_path, one_process)

    def reached(point: str) -> None:
        if point == "before-manifest":
            next(tmp_path.glob(".unfinished-step-00000001-*/rank-00000.safetensors")).unlink()

    monkeypatch.setattr(failpoints, "reached", reached)
    save(saver, engine_of(one_process), 1)
    with pytest.raises(
        CheckpointError, match=r"rank-00000\.safetensors is missing, as rank 0 sees it; .* all ranks share"
    ):
        saver.finish()
    assert visible(tmp_path) == hidden(tmp_path) == []


def test_a_full_disk_names_the_file(tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own error, of a file that may not grow: it names no file by itself."""
    saver = saver_of(tmp_path, one_process)
    save(saver, engine_of(one_process), 1)
    saver.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        save(saver, engine_of(one_process), 2)
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors cannot be written: File too large"):
            saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert visible(tmp_path) == ["latest", "step-00000001"] and hidden(tmp_path) == []


@pytest.mark.parametrize("what", ["host memory", "state", "tokenizer"])
def test_what_cannot_be_saved_is_reported(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    saver, engine = saver_of(tmp_path, one_process), engine_of(one_process)
    state: dict[str, Any] = {}
    tokenizer = None
    if what == "host memory":
        huge = Fragment("positions.weight", 0, torch.empty(1).expand(2**46))
        monkeypatch.setattr(engine, "owned_fragments", lambda with_moments: [huge])
        message = r"2\.81e\+05 GB of host memory .*set checkpoint\.asynchronous=false"
    elif what == "state":
        state, message = {"x": object()}, "not JSON serializable"
    else:
        tokenizer, message = tmp_path / "gone", "gone cannot be"
    saver.save(engine, 1, state, {}, config_of().to_yaml(), tokenizer)
    with pytest.raises(CheckpointError, match=message):
        saver.finish()
    assert visible(tmp_path) == hidden(tmp_path) == []


def test_abandoning_needs_nobody_and_does_not_wait(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, saver = engine_of(one_process), saver_of(tmp_path, one_process)
    monkeypatch.setattr("mlra_scale.checkpoint.saver._ABANDON_SECONDS", 0.2)
    with held_at(monkeypatch, "mid-file"), monkeypatch.context() as patch:
        save(saver, engine, 1)
        for name in ("all_reduce", "all_gather_object", "gather_object", "broadcast_object_list"):
            patch.setattr(dist, name, None)
        started = time.monotonic()
        saver.abandon()
        assert time.monotonic() - started < 5
        assert saver.poll() == []
        saver.abandon()
    wait_for_threads()
    assert visible(tmp_path) == []
    save(saver, engine, 2)
    saver.finish()
    assert visible(tmp_path) == ["latest", "step-00000002"] and hidden(tmp_path) == []


@pytest.mark.parametrize(("point", "left"), [("file-open", []), ("before-rename", ["latest", "step-00000001"])])
def test_an_abandoned_save_clears_away_or_is_completed(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch, point: str, left: list[str]
) -> None:
    """It is completed where that has begun."""
    saver = saver_of(tmp_path, one_process)
    with held_at(monkeypatch, point) as release:
        save(saver, engine_of(one_process), 1)
        assert saver._job is not None
        while left and not saver._job.is_committing:
            saver.poll()
        threading.Timer(0.2, release.set).start()
        saver.abandon()
    assert visible(tmp_path) == left and hidden(tmp_path) == []


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(30)


def test_collectives_are_called_in_the_main_thread_and_only_during_a_save(
    tmp_path: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[Any] = []
    for name in ("all_reduce", "all_gather_object", "gather_object", "broadcast_object_list"):
        original = getattr(dist, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            callers.append(threading.current_thread())
            assert kwargs["group"] is one_process
            return original(*args, **kwargs)

        monkeypatch.setattr(dist, name, counted)
    saver = saver_of(tmp_path, one_process)
    assert saver.poll() == [] and callers == []
    save(saver, engine_of(one_process), 1)
    saver.finish()
    assert set(callers) == {threading.main_thread()}
    callers.clear()
    assert saver.poll() == [] and callers == []
