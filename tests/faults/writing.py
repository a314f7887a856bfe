"""Every writer on a disk that fails: EIO at one operation, or a disk that is full from one operation on.

The disk is a FUSE file system of the test's own (fuse.py): the errors are the kernel's answers to real system calls. A
writer raises an error that names what it could not write, or says so and does without. What was there before stays, or
the new content is there as a whole; the same call on the mended disk then makes what it makes on a sound one.
"""

import contextlib
import errno
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from mlra_scale.checkpoint import Store, retention
from mlra_scale.cluster.job_file import JobFile, read_job_file
from mlra_scale.config import load_config
from mlra_scale.config.json_text import read_json_object
from mlra_scale.console import InputError
from mlra_scale.data.index_cache import cached_indices, damaged_caches
from mlra_scale.files import write_atomically
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file, write_cluster_file
from mlra_scale.study.results import CellFiles, write_result
from mlra_scale.training.record import JsonLines, cut_record, read_record
from mlra_scale.training.resume import read_stored
from mlra_scale.training.run_directory import RunDirectory, run_lock
from tests.faults.bench import Bench
from tests.faults.case import EIO, FULL, Case, digests, each
from tests.faults.fuse import FaultyDisk, faulty_disk
from tests.faults.reading import ROLLBACK, indices
from tests.support.stored import weights_of

OPERATIONS = ("create", "write", "fsync", "rename")
PROMISE = "one message with what cannot be written and why; the old content or the whole new one; then mended, the same"


_TRIES = 10
"""safetensors writes the same file in one operation more or less."""


@dataclass(frozen=True)
class Writer:
    """Something that writes.

    Attributes:
        name: What it writes.
        num_faults: Of EIO and of a full disk.
        prepare: Puts into a folder on the disk what is there before; gets a folder elsewhere too.
        write: Writes; gets the same. What it returns, if anything, is what it says of a fault that it does without.
        read: What is visible in the folder then, in a form that can be compared.
        is_allowed: Whether a state, of which those before and after a sound write are given too, keeps the promise.
        num_each: Most operations of one kind that fail, one after the other.
        tier: Of the case.
    """

    name: str
    num_faults: tuple[int, int]
    prepare: Callable[[Path, Path], object]
    write: Callable[[Path, Path], object]
    read: Callable[[Path], Any]
    is_allowed: Callable[[Any, Any, Any], bool] = lambda state, old, new: state in (old, new)
    num_each: int = 3
    tier: str = ""

    def case(self) -> Case:
        """All faults of this writer."""

        def act(bench: Bench, place: Path) -> None:
            elsewhere = place / "elsewhere"
            elsewhere.mkdir()
            with faulty_disk(place) as disk:
                for _ in range(2):  # what is written the first time alone, as into a library's cache, does not count
                    folder = self._fresh(disk, elsewhere)
                    old = self.read(folder)
                    disk.fail()
                    self.write(folder, elsewhere)
                    counts, new = disk.fail()["counts"], self.read(folder)
                faults = list(faults_of(counts, self.num_each))
                numbers = tuple(sum(fault[1] == error for fault in faults) for error in (errno.EIO, errno.ENOSPC))
                assert numbers == self.num_faults, f"{self.name} has {numbers} faults: {counts}"
                each(
                    (fault, lambda fault=fault: self._attack(disk, elsewhere, fault, old, new))  # type: ignore[misc]
                    for fault in faults
                )

        kinds = dict(zip((EIO, FULL), self.num_faults, strict=True))
        done = f"EIO at up to {self.num_each} creations, writes, fsyncs, renames; ENOSPC from a creation or write on"
        return Case(f"failing disk: {self.name}", done, PROMISE, act, tier=self.tier, needs="fuse", kinds=kinds)

    def _fresh(self, disk: FaultyDisk, elsewhere: Path) -> Path:
        folder = disk.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.prepare(folder, elsewhere)
        return folder

    def _attack(self, disk: FaultyDisk, elsewhere: Path, fault: tuple[str, int, int], old: Any, new: Any) -> None:
        kind, error, number = fault
        for _ in range(_TRIES):
            folder, raised = self._fresh(disk, elsewhere), None
            disk.fail(kind, number, error, stays=error == errno.ENOSPC)
            with heard() as said:
                try:
                    said.write(str(self.write(folder, elsewhere) or ""))
                except (OSError, InputError, ValueError) as refusal:
                    raised = refusal
                except Exception as refusal:
                    raise AssertionError(f"{type(refusal).__name__}: {refusal}"[:500]) from refusal
            if disk.fail()["hits"] > 0:
                break
        else:
            raise AssertionError("the fault did not come")
        state = self.read(folder)
        if raised is not None:
            assert os.strerror(error) in str(raised) and str(disk.folder) in str(raised), f"not named: {raised}"
        assert self.is_allowed(state, old, new), f"neither the old nor the new content: {state}"
        assert raised is not None or state == new or said.getvalue(), "lost without a word"
        self.write(folder, elsewhere)
        assert self.read(folder) == new, "not the same on the mended disk"
        left = [path.name for path in folder.iterdir() if path.name.startswith(".") and "lock" not in path.name]
        assert not left, f"left over: {left}"


def faults_of(counts: Mapping[str, int], num_each: int) -> Iterator[tuple[str, int, int]]:
    """Up to so many operations of each kind, the first and the last among them, as (operation, error, number)."""
    for error, kinds in ((errno.EIO, OPERATIONS), (errno.ENOSPC, OPERATIONS[:2])):
        for kind in kinds:
            last = counts.get(kind, 0)
            share = (last - 1) / (num_each - 1)
            for number in sorted({round(1 + place * share) for place in range(num_each)}) if last else ():
                yield kind, error, number


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """What is logged and printed meanwhile."""
    text = io.StringIO()
    handler, root = logging.StreamHandler(text), logging.getLogger()
    root.addHandler(handler)
    try:
        with contextlib.redirect_stderr(text):
            yield text
    finally:
        root.removeHandler(handler)


def nothing(folder: Path, elsewhere: Path) -> None:
    """Nothing is there before."""


def save(folder: Path, elsewhere: Path) -> str | None:
    """A checkpoint of two ranks that takes the place of the one before; returns what retention says."""
    from tests.unit.checkpoint.builders import Layout, write_checkpoint

    retention.tidy(folder)
    faults: list[str | None] = []
    write_checkpoint(folder, 2, Layout(2), keep_last=1, faults=faults)
    return faults[0]


def saved_before(folder: Path, elsewhere: Path) -> None:
    """The one before."""
    from tests.unit.checkpoint.builders import Layout, write_checkpoint

    write_checkpoint(folder, 1, Layout(2))


def newest(folder: Path) -> Any:
    """The newest checkpoint; all that are visible are whole, and `latest` names one of them."""
    for path in folder.glob("step-*"):
        assert Store.open(path).verify() == [], path
    found, named = retention.newest_complete(folder), retention.latest(folder)
    assert found is not None and named is not None and named.exists()
    return Store.open(found).step, weights_of(Store.open(found))


def record(folder: Path, elsewhere: Path) -> None:
    """Appends the lines that are missing of eight, as a run that continues does."""
    lines = JsonLines(folder / "metrics.jsonl")
    for step in range(len(read_record(folder / "metrics.jsonl")) + 1, 9):
        lines.write({"step": step})
        lines.sync()
    lines.close()


def read_steps(folder: Path) -> list[int]:
    """The steps of a record."""
    return [item["step"] for item in read_record(folder / "metrics.jsonl", "step")]


def write_job(folder: Path, elsewhere: Path) -> None:
    """The state of a job changes."""
    job = JobFile.read(folder / "job.json")
    job.become("done", "all steps")


def if_there(path: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Reads a file or folder below a folder; None where it is not there."""
    return lambda folder: read(folder / path) if (folder / path).exists() else None


def cell(folder: Path) -> CellFiles:
    """The files of a cell of a sweep."""
    return CellFiles(cast(Any, SimpleNamespace(name="a")), RunDirectory(folder))


def take_lock(folder: Path, elsewhere: Path) -> None:
    """Locks a run directory for a moment."""
    with run_lock(RunDirectory(folder / "run")):
        pass


def prepare_data(folder: Path, elsewhere: Path) -> None:
    """A data set from a text."""
    from mlra_scale.data.mixture import Component
    from mlra_scale.data.options import PrepareOptions
    from mlra_scale.data.prepare import prepare
    from mlra_scale.data.sources import SourceName

    text = elsewhere / "text.jsonl"
    if not text.exists():
        text.write_text("".join(f'{{"text": "document {number} of some words"}}\n' for number in range(200)))
    sources = [Component("", [SourceName(str(text))])]
    options = PrepareOptions(
        folder / "data", sources, train_bpe=270, validation_fraction=0.3, workers=1, progress=False, overwrite=True
    )
    # What fails behind the rename leaves a whole data set, which only --overwrite replaces.
    prepare(options)


def export(name: str) -> Callable[[Path, Path], None]:
    """An export, of a checkpoint that lies elsewhere."""

    def write(folder: Path, elsewhere: Path) -> None:
        from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, export_checkpoint
        from tests.unit.checkpoint.huggingface.builders import checkpoint

        source = elsewhere / "checkpoint"
        store = Store.open(source) if source.exists() else checkpoint(source)
        export_checkpoint(store, folder / "out", ExportOptions(export_format=cast(Any, name), is_replacing=True), None)

    return write


def import_gpt2(folder: Path, elsewhere: Path) -> None:
    """A GPT-2 of transformers as a checkpoint."""
    from mlra_scale.checkpoint.huggingface.importing import import_gpt2
    from tests.support.gpt2_folders import gpt2_folder

    source = elsewhere / "gpt2"
    if not source.exists():
        gpt2_folder(source)
    shutil.rmtree(folder / "out", ignore_errors=True)
    import_gpt2(source, folder / "out")


def report(folder: Path, elsewhere: Path) -> None:
    """The report on a run that lies elsewhere."""
    from mlra_scale.study.report.run_report import report_run
    from tests.faults.reading import RUN, make_run

    if not (elsewhere / "made").exists():
        make_run(cast(Any, None), elsewhere / "made")
    report_run(elsewhere / "made" / RUN, folder / "out")


WRITERS = (
    Writer(
        "any small file",
        (5, 2),
        lambda folder, elsewhere: write_atomically(folder / "latest", "step-1\n"),
        lambda folder, elsewhere: write_atomically(folder / "latest", "step-2\n"),
        lambda folder: (folder / "latest").read_text(),
    ),
    Writer("checkpoint", (12, 6), saved_before, save, newest, tier="slow"),
    Writer(
        "record",
        (6, 3),
        lambda folder, elsewhere: write_atomically(folder / "metrics.jsonl", '{"step": 1}\n'),
        record,
        read_steps,
        is_allowed=lambda state, old, new: state == new[: len(state)] and len(state) >= len(old),
    ),
    Writer(
        "record that is cut",
        (9, 5),
        lambda folder, elsewhere: write_atomically(
            folder / "metrics.jsonl", "".join(f'{{"step": {step}}}\n' for step in range(1, 9))
        ),
        lambda folder, elsewhere: cut_record(folder / "metrics.jsonl", 5, folder / "rolled_back.jsonl", 1) and None,
        read_steps,
    ),
    Writer(
        "run directory",
        (6, 3),
        nothing,
        lambda folder, elsewhere: RunDirectory(folder / "run").create(load_config("debug")),
        if_there("run/config.yaml", read_stored),
    ),
    # An empty directory, or an empty file in it, is no harm; a lock that is not held without an error is.
    Writer("lock of a run", (4, 4), nothing, take_lock, digests, lambda state, old, new: True),
    Writer(
        "guard.json",
        (5, 2),
        lambda folder, elsewhere: RunDirectory(folder).write_rollbacks([ROLLBACK]),
        lambda folder, elsewhere: RunDirectory(folder).write_rollbacks([ROLLBACK, ROLLBACK]),
        lambda folder: RunDirectory(folder).read_rollbacks(),
    ),
    Writer(
        "job.json",
        (5, 2),
        lambda folder, elsewhere: JobFile(folder / "job.json", job_id="7").write(),
        write_job,
        lambda folder: read_job_file(RunDirectory(folder)).state,
    ),
    Writer(
        "result of a cell",
        (5, 2),
        nothing,
        lambda folder, elsewhere: write_result(cell(folder), {"cell": "a", "state": "done"}, keep_checkpoints=True),
        if_there("result.json", read_json_object),
    ),
    Writer(
        "cluster file",
        (5, 2),
        nothing,
        lambda folder, elsewhere: write_cluster_file(folder / "cluster.json", named_cluster("h100"), []),
        if_there("cluster.json", read_cluster_file),
    ),
    Writer(
        "cached index",
        (10, 6),
        nothing,
        lambda folder, elsewhere: cached_indices(folder, "an epoch", indices) and None,
        damaged_caches,  # none before and after: one that is not whole would be seen
    ),
    Writer("data set", (47, 29), nothing, prepare_data, if_there("data", digests), num_each=16, tier="slow"),
    Writer(
        "export, gpt2",
        (37, 25),
        nothing,
        export("gpt2"),
        if_there("out", lambda path: digests(path, "README.md")),
        num_each=16,
        tier="slow",
    ),
    Writer(
        "export, mlra",
        (41, 27),
        nothing,
        export("mlra"),
        if_there("out", lambda path: digests(path, "README.md")),
        num_each=16,
        tier="slow",
    ),
    Writer(
        "import",
        (44, 27),
        nothing,
        import_gpt2,
        if_there("out", lambda path: weights_of(Store.open(path))),
        num_each=16,
        tier="slow",
    ),
    Writer(
        "report",
        (10, 7),
        nothing,
        report,
        if_there("out/report.html", lambda path: path.read_text().rstrip().endswith("</html>")),
        num_each=16,
        tier="slow",
    ),
)
CASES = tuple(writer.case() for writer in WRITERS)
