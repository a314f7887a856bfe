"""The saver on two ranks: what one rank meets, both learn in the same call."""

import errno
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.checkpoint import CheckpointError, Saver, Store, complete_checkpoints, failpoints, latest
from mlra_scale.checkpoint.failpoints import FAILPOINTS
from mlra_scale.checkpoint.loading import open_on_all_ranks
from tests.support.pool import WorkerPool
from tests.unit.checkpoint.builders import FakeEngine, Layout, all_parts, config_of, write_checkpoint

Pools = Callable[[int], WorkerPool]
LAYOUTS = [Layout(tensor=2), Layout(pipeline=2), Layout(data=2), Layout(data=2, is_replicated=True)]


def saver_and_engine(rank: int, layout: Layout, folder: str, asynchronous: bool = True) -> tuple[Saver, Any]:
    import torch.distributed as dist

    topology = layout.topology(rank, dist.new_group(backend="gloo"))
    return Saver(Path(folder), topology, 10, 0, asynchronous), FakeEngine(topology, layout, all_parts())


def save(saver: Saver, engine: Any, step: int) -> None:
    saver.save(engine, step, {"engine": None}, {}, config_of().to_yaml(), None)


def save_in_layouts(rank: int, world_size: int, folder: str) -> list[Any]:
    finished = []
    for number, layout in enumerate(LAYOUTS):
        saver, engine = saver_and_engine(rank, layout, f"{folder}/{number}", asynchronous=number % 2 == 0)
        save(saver, engine, 1)
        finished += saver.finish()
    return finished


def test_every_layout_saves_the_model(tmp_path: Path, worker_pool: Pools) -> None:
    results = worker_pool(2).run(save_in_layouts, str(tmp_path))
    assert results[0] == results[1]
    for number, layout in enumerate(LAYOUTS):
        assert results[0][number].path == tmp_path / str(number) / "step-00000001"
        store = Store.open(results[0][number].path)
        assert store.verify() == [] and store.manifest.layout["world_size"] == 2, layout
        for part, tensors in all_parts().items():
            for name, tensor in tensors.items():
                assert store.tensor(name, part).equal(tensor), (layout, name)  # type: ignore[arg-type]


def fail_at(where: str, point: str) -> None:
    if point == where:
        raise OSError(errno.ENOSPC, "No space left on device")


def fail_on_one_rank(rank: int, world_size: int, folder: str) -> list[tuple[str, str, int, list[str]]]:
    """For each point and rank: the error, and in which poll it came out."""
    found = []
    saver, engine = saver_and_engine(rank, Layout(tensor=2), folder)
    save(saver, engine, 1)
    saver.finish()
    original = failpoints.reached
    for bad in range(world_size):
        for point in ("snapshot", "copy", "file-open", "mid-file", "file-complete"):
            failpoints.reached = partial(fail_at, point if rank == bad else "nowhere")
            polls = 0
            try:
                save(saver, engine, 2)
                while True:
                    polls += 1
                    time.sleep(0.002)
                    saver.poll()
            except CheckpointError as error:
                found.append((point, str(error), polls, sorted(path.name for path in Path(folder).iterdir())))
            finally:
                failpoints.reached = original
    save(saver, engine, 3)
    assert [record.step for record in saver.finish()] == [3]
    return found


def test_an_error_of_one_rank_is_an_error_of_all(tmp_path: Path, worker_pool: Pools) -> None:
    results = worker_pool(2).run(fail_on_one_rank, str(tmp_path))
    for rank, found in enumerate(results):
        assert [entry[:3] for entry in found] == [entry[:3] for entry in results[0]]
        for number, (point, text, _, files) in enumerate(found):
            assert point in FAILPOINTS
            assert f"the save of step 2 failed: rank {number // 5}: " in text and "No space left" in text
            # Rank 0 removes the folder before it raises; rank 1 may look a moment earlier.
            assert rank == 1 or files == ["latest", "step-00000001"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]
    assert latest(tmp_path) == tmp_path / "step-00000003"


COPIES = (
    (LAYOUTS[0], "positions.weight"),
    (LAYOUTS[1], "embedding.weight"),
    (LAYOUTS[3], "blocks.1.mlp.fc_out.weight"),
)
"""Parameters that both ranks of a layout hold."""


def save_copies_that_differ(rank: int, world_size: int, folder: str) -> list[Any]:
    """For each layout: the error of a save, and the drift that a saver reports which may save such weights."""
    found = []
    for number, (layout, name) in enumerate(COPIES):
        saver, engine = saver_and_engine(rank, layout, f"{folder}/{number}")
        lenient = Saver(Path(f"{folder}/{number}"), engine.topology, 10, 0, True, may_copies_differ=True)
        save(lenient, engine, 1)
        assert [finished.drift for finished in lenient.finish()] == [None]
        for fragment in engine.fragments:
            if rank == 1 and fragment.name == name:
                fragment.exp_avg[0] += 1.0
        save(saver, engine, 2)
        with pytest.raises(CheckpointError) as caught:
            saver.finish()
        save(lenient, engine, 3)
        found.append((str(caught.value), [finished.drift for finished in lenient.finish()]))
    return found


def test_ranks_that_drifted_apart_are_saved_only_where_that_is_allowed(tmp_path: Path, worker_pool: Pools) -> None:
    results = worker_pool(2).run(save_copies_that_differ, str(tmp_path))
    assert results[0] == results[1]
    for number, (_, name) in enumerate(COPIES):
        drift = f"copies of exp_avg of {name} that should be equal differ between rank(s) 0 and rank(s) 1"
        error, reported = results[0][number]
        assert drift in error and "nothing was saved" in error and reported == [drift]
        names = ["latest", "step-00000001", "step-00000003"]
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == names


def wait_for_a_slow_rank(rank: int, world_size: int, folder: str) -> float:
    """One rank writes for longer than a collective may wait: the others must not run into that limit."""
    from datetime import timedelta

    import torch.distributed as dist

    layout = Layout(tensor=2)
    topology = layout.topology(rank, dist.new_group(backend="gloo", timeout=timedelta(seconds=2)))
    saver, engine = Saver(Path(folder), topology, 10, 0, True), FakeEngine(topology, layout, all_parts())
    original = failpoints.reached
    failpoints.reached = lambda name: time.sleep(3.5) if (name, rank) == ("mid-file", 1) else None
    try:
        save(saver, engine, 1)
        (finished,) = saver.finish()
    finally:
        failpoints.reached = original
    return finished.write_seconds


def test_a_rank_that_writes_for_long_is_waited_for(tmp_path: Path, worker_pool: Pools) -> None:
    for seconds in worker_pool(2).run(wait_for_a_slow_rank, str(tmp_path)):
        assert seconds > 3


def test_a_folder_that_cannot_be_made_is_an_error_of_all(tmp_path: Path, worker_pool: Pools) -> None:
    (tmp_path / "file").write_text("")
    for text in worker_pool(2).run(fail_to_start, str(tmp_path / "file" / "checkpoints")):
        assert (
            text.startswith("the save of step 1 failed: ") and "/checkpoints cannot be written: Not a directory" in text
        )


def fail_to_start(rank: int, world_size: int, folder: str) -> str:
    saver, engine = saver_and_engine(rank, LAYOUTS[0], folder)
    with pytest.raises(CheckpointError) as caught:
        save(saver, engine, 1)
    return str(caught.value)


def open_what_one_rank_does_not_see(rank: int, world_size: int, folder: str) -> str:
    _, engine = saver_and_engine(rank, LAYOUTS[0], folder)
    try:
        open_on_all_ranks(Path(folder) / f"seen-by-{rank}", engine.topology)
    except CheckpointError as error:
        return str(error)
    return "opened"


def test_a_checkpoint_is_opened_on_all_ranks_or_on_none(tmp_path: Path, worker_pool: Pools) -> None:
    for rank in range(2):
        write_checkpoint(tmp_path / f"rank-{rank}", 1, Layout(), all_parts()).rename(tmp_path / f"seen-by-{rank}")
    assert worker_pool(2).run(open_what_one_rank_does_not_see, str(tmp_path)) == ["opened", "opened"]
    (tmp_path / "seen-by-1" / "manifest.json").unlink()
    errors = worker_pool(2).run(open_what_one_rank_does_not_see, str(tmp_path))
    assert all("cannot be opened: rank 1: " in text and "manifest.json" in text for text in errors)
