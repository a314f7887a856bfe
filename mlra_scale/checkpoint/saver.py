"""Saving a run: the ranks agree in the main thread, and write in the background.

A save has two phases. First every rank writes its own file into a folder with an unfinished name; then rank 0 adds the
other files and gives the folder its name. Between the phases, and at the end, the ranks exchange a few bytes over the
control group, always from the main thread and after the same training step, so no collective of a background thread
can ever interfere with one of training. An error of any rank is raised on all ranks, in the same call.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
import torch.distributed as dist

from mlra_scale.checkpoint import failpoints, retention
from mlra_scale.checkpoint.copies import copied_parameters, differing_copies
from mlra_scale.checkpoint.files import CheckpointError, system_errors
from mlra_scale.checkpoint.saving import (
    CANCELLED,
    BackgroundTask,
    HostMemory,
    MainFiles,
    RankReport,
    Snapshot,
    build_manifest,
    commit,
    error_text,
    take_snapshot,
    write_share,
)
from mlra_scale.checkpoint.state_contents import json_bytes

if TYPE_CHECKING:
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel import Engine
    from mlra_scale.parallel.topology import Topology

_EXCHANGE_SECONDS = 1.0
"""Ranks that wait for a save communicate at this interval, so that no collective reaches its timeout."""

_ABANDON_SECONDS = 20.0
"""How long an abandoned save may take to stop; then it is left to end with the process."""


@dataclass(frozen=True)
class FinishedSave:
    """A checkpoint that is complete and has its name; the same on every rank.

    Attributes:
        step: Optimizer steps done.
        path: Its folder, whose files have `bytes` bytes.
        stall_seconds: The longest time that training waited on a rank's host. On a GPU the time for which an
            update waits for the copies is not part of it.
        write_seconds: How long writing took, in the background or not: the slowest rank's file, then the completion.
        drift: Copies that should be equal and are not, where the saver saves such weights; else None.
        not_removed: Why earlier checkpoints that are no longer kept could not be removed; None: they were.
    """

    step: int
    path: Path
    bytes: int
    stall_seconds: float
    write_seconds: float
    drift: str | None = None
    not_removed: str | None = None


@dataclass
class _Job:
    """A save in flight on this rank; `task` is the phase that it is in: writing, then committing."""

    save_id: str
    step: int
    unfinished: Path
    table: ParameterTable
    pinned: int | None
    main: MainFiles | None
    cancel: threading.Event
    task: BackgroundTask
    is_committing: bool = False
    stall_seconds: float = 0.0


class Saver:
    """Writes checkpoints of a run; one at a time. Every method but `abandon` is collective and for the main thread."""

    def __init__(
        self,
        checkpoints_folder: Path,
        topology: Topology,
        keep_last: int,
        keep_every: int,
        asynchronous: bool,
        may_copies_differ: bool = False,
    ) -> None:
        """Makes a saver; nothing is written yet.

        Args:
            checkpoints_folder: The folder of the run's checkpoints, on a disk that all ranks share.
            topology: The mesh.
            keep_last: See retention.prunable.
            keep_every: See retention.prunable.
            asynchronous: Whether training continues while a checkpoint is written, from a copy in host memory.
            may_copies_differ: Whether to save the owner's copy where copies that should be equal are not, and to report
                them (FinishedSave.drift); otherwise such a save fails.
        """
        self._folder = checkpoints_folder
        self._topology = topology
        self._keep_last, self._keep_every = keep_last, keep_every
        self._asynchronous = asynchronous
        self._may_copies_differ = may_copies_differ
        self._memory = HostMemory()
        self._copied: frozenset[str] | None = None
        self._job: _Job | None = None
        self._finished: list[FinishedSave] = []

    def save(
        self,
        engine: Engine,
        step: int,
        state: dict[str, Any],
        buffers: dict[str, torch.Tensor],
        config_text: str,
        tokenizer: Path | None,
        synchronous: bool = False,
        pinned: int | None = None,
    ) -> None:
        """Starts a save, after waiting for the one before; or does all of it at once where the saver is synchronous.

        Args:
            engine: Its weights and moments are saved.
            step: Optimizer steps done.
            state: JSON values; rank 0's are stored.
            buffers: Small named tensors; rank 0's are stored.
            config_text: The resolved configuration as a YAML document.
            tokenizer: The data's tokenizer folder, or None.
            synchronous: Whether to do all of it at once this time.
            pinned: Step of an earlier checkpoint that must be kept.

        Raises:
            CheckpointError: On every rank; the folder of this save is removed, earlier checkpoints are unchanged.
        """
        self._complete_job()
        started = time.perf_counter()
        is_background = self._asynchronous and not synchronous
        save_id, unfinished = self._prepare(step)
        if self._copied is None:
            self._copied = copied_parameters(engine)
        cancel, main = threading.Event(), None
        try:
            snapshot = take_snapshot(engine, self._copied, self._memory if is_background else None)
            if self._topology.rank == 0:
                # Copies: training changes these tensors too.
                tensors = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in buffers.items()]
                main = MainFiles(json_bytes(state), tensors, config_text, tokenizer)
            task = BackgroundTask(partial(write_share, unfinished, save_id, self._topology, snapshot, cancel))
            if is_background:  # last: without its task nobody would ever read the snapshot
                engine.before_change = partial(self._before_change, engine, snapshot)
        except Exception as error:
            # The other ranks enter the first exchange: this one must enter it too, and report its error there.
            task = BackgroundTask(partial(_raise, error))
        self._job = _Job(save_id, step, unfinished, engine.table, pinned, main, cancel, task)
        self._job.stall_seconds = time.perf_counter() - started
        if not is_background:
            self._complete_job()

    def _before_change(self, engine: Engine, snapshot: Snapshot) -> None:
        """Lets an update wait until the save has read what it is about to change."""
        started = time.perf_counter()
        snapshot.before_change()
        engine.before_change = None
        if self._job is not None:
            self._job.stall_seconds += time.perf_counter() - started

    def poll(self) -> list[FinishedSave]:
        """Advances a save in flight as far as possible without waiting. Every rank calls it after each training step.

        Returns:
            The saves that have been completed since the last call of poll or finish.

        Raises:
            CheckpointError: The save failed on some rank; on every rank, with the same text.
        """
        if self._job is not None:
            self._advance(self._job, time.perf_counter())
        return self._take_finished()

    def finish(self) -> list[FinishedSave]:
        """Waits for the save in flight, if there is one; otherwise as `poll`."""
        self._complete_job()
        return self._take_finished()

    def cancel(self) -> None:
        """Ends the save in flight, whatever becomes of it; one that is being completed at this moment is completed."""
        if self._job is not None and not self._job.is_committing:
            self._job.cancel.set()
        with contextlib.suppress(CheckpointError):
            self._complete_job()
        self._finished.clear()

    def abandon(self) -> None:
        """Cancels the save in flight; for use when a rank has failed. It is not collective and does not wait for long.

        A checkpoint that is being completed at this moment is completed.
        """
        job, self._job = self._job, None
        if job is None:
            return
        if not job.is_committing:
            job.cancel.set()
        job.task.wait(_ABANDON_SECONDS)
        if not job.task.is_done:
            self._memory = HostMemory()  # the old buffer is still being read
        elif self._topology.rank == 0:
            shutil.rmtree(job.unfinished, ignore_errors=True)

    def _take_finished(self) -> list[FinishedSave]:
        finished, self._finished = self._finished, []
        return finished

    def _prepare(self, step: int) -> tuple[str, Path]:
        """Rank 0 makes the unfinished folder; all ranks learn the save's id, or the error."""
        answer: list[Any] = [uuid4().hex, None]
        if self._topology.rank == 0:
            try:
                with system_errors("written", self._folder):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    retention.tidy(self._folder)
                    self._unfinished(step, answer[0]).mkdir()
            except Exception as error:
                answer[1] = error_text(error)  # raised on every rank, below
        dist.broadcast_object_list(answer, src=0, group=self._topology.control_group)
        save_id, fault = answer
        if fault is not None:
            raise CheckpointError(f"the save of step {step} failed: {fault}")
        return save_id, self._unfinished(step, save_id)

    def _unfinished(self, step: int, save_id: str) -> Path:
        """The folder of this save alone: a process of a run that should be dead may still write into its own.

        Two saves in one folder, each removing what it takes for remainders, could complete a mixture.
        """
        return self._folder / f"{retention.UNFINISHED}{retention.checkpoint_name(step)}-{save_id[:8]}"

    def _complete_job(self) -> None:
        while (job := self._job) is not None:
            started = time.perf_counter()
            job.task.wait(_EXCHANGE_SECONDS)
            self._advance(job, started)

    def _advance(self, job: _Job, started: float) -> None:
        """One exchange between the ranks, and the next phase if all have ended this one.

        Training has been waiting since `started`, a time of perf_counter.
        """
        are_done, are_well = self._agree(job.task.is_done, job.task.error is None)
        if not are_well:
            self._fail(job)
        if are_done and job.is_committing:
            self._conclude(job, job.stall_seconds + time.perf_counter() - started)
        elif are_done:
            self._start_commit(job, job.stall_seconds + time.perf_counter() - started)
        job.stall_seconds += time.perf_counter() - started

    def _agree(self, *mine: bool) -> list[bool]:
        """Returns for each answer whether it is True on all ranks."""
        packed = torch.tensor(mine, dtype=torch.int32)
        dist.all_reduce(packed, op=dist.ReduceOp.MIN, group=self._topology.control_group)
        return [bool(answer) for answer in packed.tolist()]

    def _start_commit(self, job: _Job, stall_seconds: float) -> None:
        """All ranks have written: rank 0 gathers the reports, and completes the checkpoint in the background."""
        failpoints.reached("agreed")
        report: RankReport = job.task.result
        report.stall_seconds, report.write_seconds = stall_seconds, job.task.seconds
        reports: list[Any] | None = [None] * self._topology.world_size if self._topology.rank == 0 else None
        dist.gather_object(report, reports, dst=0, group=self._topology.control_group)
        job.task = BackgroundTask(partial(self._commit, job, reports))
        job.is_committing = True

    def _commit(self, job: _Job, reports: list[RankReport] | None) -> FinishedSave | None:
        """In the background; only rank 0 has anything to do."""
        if reports is None:
            return None
        assert job.main is not None
        drift = differing_copies(reports, job.table, self._topology.tensor)
        if drift is not None and not self._may_copies_differ:
            raise CheckpointError(
                f"{drift}; nothing was saved. The ranks have drifted apart (a gradient that was not reduced, or a "
                "fault of a device): resume from a checkpoint before that. If the library that adds up gradients is "
                "known to round them otherwise on each rank, checkpoint.differing_copies=report saves the owner's copy"
            )
        manifest = build_manifest(job.unfinished, job.save_id, job.step, reports, job.main, job.table, self._topology)
        not_removed = commit(job.unfinished, manifest, self._keep_last, self._keep_every, job.pinned)
        stall_seconds = max(report.stall_seconds for report in reports)
        write_seconds = max(report.write_seconds for report in reports)
        path = self._folder / retention.checkpoint_name(job.step)
        return FinishedSave(job.step, path, manifest.total_bytes, stall_seconds, write_seconds, drift, not_removed)

    def _conclude(self, job: _Job, stall_seconds: float) -> None:
        """The checkpoint is complete: all ranks learn its figures."""
        finished: FinishedSave | None = job.task.result  # of the writing so far
        if finished is not None:
            stall_seconds = max(stall_seconds, finished.stall_seconds)
            write_seconds = finished.write_seconds + job.task.seconds
            finished = replace(finished, stall_seconds=stall_seconds, write_seconds=write_seconds)
        shared = [finished]
        dist.broadcast_object_list(shared, src=0, group=self._topology.control_group)
        assert shared[0] is not None
        self._finished.append(shared[0])
        self._job = None

    def _fail(self, job: _Job) -> None:
        """Ends a save that failed somewhere: all ranks stop, the unfinished folder is removed, all raise the same."""
        job.cancel.set()
        while True:
            job.task.wait(_EXCHANGE_SECONDS)
            if self._agree(job.task.is_done)[0]:
                break
        errors: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(errors, job.task.error, group=self._topology.control_group)
        if self._topology.rank == 0:
            shutil.rmtree(job.unfinished, ignore_errors=True)
        self._job = None
        faults = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error not in (None, CANCELLED)]
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"the save of step {job.step} failed: {'; '.join(faults[:3])}{more}")


def _raise(error: Exception) -> None:
    raise error
