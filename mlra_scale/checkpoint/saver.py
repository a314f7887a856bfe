"""Saving a run: the ranks agree in the main thread, and write in the background.

A save goes through two phases. First every rank writes its own file into a folder with an unfinished name; then rank 0
adds the manifest and gives the folder its name. Between the phases, and at the end, the ranks exchange a few bytes over
the control group, always from the main thread and at the same moment of training, so no collective of a background
thread can ever meet one of training. An error of any rank is an error of all ranks, in the same call.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
import torch.distributed as dist

from mlra_scale.checkpoint import points, retention
from mlra_scale.checkpoint.contents import json_bytes
from mlra_scale.checkpoint.copies import RankCopies, collect, copied_parameters, differing_copies, digests_on_device
from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import faults_told
from mlra_scale.checkpoint.saving import (
    GIVEN_UP,
    MainShare,
    RankReport,
    RankShare,
    Work,
    commit,
    describe,
    host_copies,
    told,
    write_share,
)
from mlra_scale.checkpoint.snapshot import Arrival, HostMemory, named_parts

if TYPE_CHECKING:
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel.interface import Engine
    from mlra_scale.parallel.topology import Topology

_HEARTBEAT_SECONDS = 1.0
"""So often ranks that wait for a save hear of each other, so that no collective runs into its timeout."""

_ABANDON_SECONDS = 20.0
"""So long an abandoned save may take to stop; then it is left to die with the process."""


@dataclass(frozen=True)
class FinishedSave:
    """A checkpoint that is complete and has its name; the same on every rank.

    Attributes:
        step: Optimizer steps done.
        path: Its folder.
        bytes: Size of its files.
        stall_seconds: How long it kept training waiting: the longest of all ranks.
        write_seconds: How long writing took, in the background or not: the slowest rank's file, then the completion.
        drift: Copies that should be equal and are not, where the saver was told to save all the same; else None.
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
    """A save in flight on this rank; `work` is the phase that it is in."""

    save_id: str
    step: int
    unfinished: Path
    table: ParameterTable
    pinned: int | None
    share: RankShare
    main: MainShare | None
    cancel: threading.Event
    work: Work
    is_committing: bool = False
    reports: list[RankReport] | None = None
    total_bytes: int = 0
    stall_seconds: float = 0.0
    drift: str | None = None
    not_removed: str | None = None


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
            checkpoints_folder: Where the run's checkpoints lie, on a disk that all ranks share.
            topology: The mesh.
            keep_last: How many of the newest checkpoints are kept.
            keep_every: Checkpoints at a multiple of so many steps are kept too; 0: none.
            asynchronous: Whether training goes on while a checkpoint is written, from a copy in host memory.
            may_copies_differ: Whether copies that should be equal and are not are told (FinishedSave.drift) while the
                owner's are saved; otherwise such a save fails.
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
            engine: Its weights and moments go in.
            step: Optimizer steps done.
            state: JSON values; rank 0's are stored.
            buffers: Small named tensors; rank 0's are stored.
            config_text: The resolved configuration as a YAML document.
            tokenizer: The data's tokenizer folder, or None.
            synchronous: Does all of it at once this time, without host memory for a copy.
            pinned: Step of an earlier checkpoint that must be kept.

        Raises:
            CheckpointError: On every rank; the folder of this save is gone again, earlier checkpoints are as they were.
        """
        self._complete_job()
        started = time.perf_counter()
        is_background = self._asynchronous and not synchronous
        save_id, unfinished = self._prepare(step)
        if self._copied is None:
            self._copied = copied_parameters(engine)
        cancel = threading.Event()
        file = f"rank-{self._topology.rank:05d}.safetensors"
        share, main = RankShare(file, self._topology.tensor_rank), None
        try:
            wait_for_copies = self._snapshot(engine, share, is_background)
            if self._topology.rank == 0:
                main = MainShare(json_bytes(state), host_copies(buffers), config_text, tokenizer)
        except Exception as error:
            # The other ranks are on their way into the first exchange: this one must go there too, and tell.
            failure = CheckpointError(told(error))
            work = Work(partial(_raise, failure))
        else:
            work = Work(partial(_write, wait_for_copies, unfinished, save_id, share, main, cancel))
        self._job = _Job(save_id, step, unfinished, engine.table, pinned, share, main, cancel, work)
        self._job.stall_seconds = time.perf_counter() - started
        if not is_background:
            self._complete_job()

    def poll(self) -> list[FinishedSave]:
        """Brings a save in flight forward as far as it can without waiting; nothing to do where there is none.

        Called by every rank after each training step.

        Returns:
            The saves that have been completed since the last call of poll or finish.

        Raises:
            CheckpointError: The save failed on some rank; on every rank, with the same text.
        """
        if self._job is not None:
            self._advance(self._job, time.perf_counter())
        return self._take_finished()

    def finish(self) -> list[FinishedSave]:
        """Waits for the save in flight, if there is one.

        Returns:
            As poll.

        Raises:
            CheckpointError: As poll.
        """
        self._complete_job()
        return self._take_finished()

    def abandon(self) -> None:
        """Gives up the save in flight; for use when a rank has failed. Neither collective nor waiting for long.

        A checkpoint that is being completed at this moment is completed.
        """
        job, self._job = self._job, None
        if job is None:
            return
        if not job.is_committing:
            job.cancel.set()
        job.work.wait(_ABANDON_SECONDS)
        if not job.work.is_done:
            self._memory = HostMemory()  # the old buffer is still being read
        elif self._topology.rank == 0:
            shutil.rmtree(job.unfinished, ignore_errors=True)

    def _take_finished(self) -> list[FinishedSave]:
        finished, self._finished = self._finished, []
        return finished

    def _prepare(self, step: int) -> tuple[str, Path]:
        """Rank 0 makes the unfinished folder; all ranks learn the save's id, or the error."""
        answer: list[str | None] = [None, None]
        if self._topology.rank == 0:
            save_id = uuid4().hex
            try:
                with faults_told("written", self._folder):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    retention.tidy(self._folder)
                    self._unfinished(step, save_id).mkdir()
                answer[0] = save_id
            except Exception as error:
                answer[1] = told(error)  # raised on every rank, below
        dist.broadcast_object_list(answer, src=0, group=self._topology.control_group)
        agreed_id, error_text = answer
        if agreed_id is None:
            raise CheckpointError(f"the save of step {step} failed: {error_text}")
        return agreed_id, self._unfinished(step, agreed_id)

    def _unfinished(self, step: int, save_id: str) -> Path:
        """Where the save is written: no two saves share a folder, not even with processes of a run that should be dead.

        Two that wrote into one folder, each removing what it took for leftovers, could complete a mixture.
        """
        return self._folder / f"{retention.UNFINISHED}{retention.checkpoint_name(step)}-{save_id[:8]}"

    def _snapshot(self, engine: Engine, share: RankShare, is_background: bool) -> Callable[[], None]:
        """Fills the share; returns what has to be called before it is read."""
        points.reached("snapshot")
        topology = self._topology
        owned = [fragment for fragment in engine.owned_fragments(with_moments=True) if fragment.values.numel() > 0]
        share.runs = [(fragment.name, fragment.start, fragment.values.numel()) for fragment in owned]
        if owned:
            share.has_moments = owned[0].exp_avg is not None
        assert self._copied is not None
        keys, values = digests_on_device(engine.held_fragments(with_moments=True), self._copied)
        share.tensors = named_parts(owned)
        if is_background:
            share.tensors = self._memory.copy(share.tensors)
        host = None
        if values is not None:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            host.copy_(values, non_blocking=True)
        arrival = Arrival(topology.device)

        def arrived() -> None:
            arrival.wait()
            if host is not None:
                share.digests.update(collect(keys, host.tolist()))

        return arrived

    def _complete_job(self) -> None:
        while (job := self._job) is not None:
            started = time.perf_counter()
            job.work.wait(_HEARTBEAT_SECONDS)
            self._advance(job, started)

    def _advance(self, job: _Job, started: float) -> None:
        """One exchange between the ranks, and the next phase if all have done with this one.

        Args:
            job: The save in flight.
            started: Since when training has been waiting.
        """
        are_done, are_well = self._agree(job.work.is_done, job.work.error is None)
        if not are_well:
            self._fail(job)
        if are_done and job.is_committing:
            self._conclude(job, job.stall_seconds + time.perf_counter() - started)
        elif are_done:
            self._start_commit(job, job.stall_seconds + time.perf_counter() - started)
        job.stall_seconds += time.perf_counter() - started

    def _agree(self, *mine: bool) -> list[bool]:
        """Returns for each answer whether all ranks say yes."""
        packed = torch.tensor(mine, dtype=torch.int32)
        dist.all_reduce(packed, op=dist.ReduceOp.MIN, group=self._topology.control_group)
        return [bool(answer) for answer in packed.tolist()]

    def _start_commit(self, job: _Job, stall_seconds: float) -> None:
        """All files are written: rank 0 hears what is in them, and completes the checkpoint in the background."""
        points.reached("agreed")
        share, topology = job.share, self._topology
        assert share.entry is not None
        share.tensors = []
        copies = RankCopies(topology.rank, topology.tensor_rank, topology.pipeline_rank, share.digests)
        report = RankReport(
            share.file, share.entry, share.line, share.has_moments, copies, stall_seconds, job.work.seconds
        )
        is_main = topology.rank == 0
        gathered: list[Any] | None = [None] * topology.world_size if is_main else None
        dist.gather_object(report, gathered, dst=0, group=topology.control_group)
        job.reports = gathered
        job.work = Work(partial(self._commit, job))
        job.is_committing = True

    def _commit(self, job: _Job) -> None:
        """In the background; only rank 0 has anything to do."""
        if job.reports is None:
            return
        assert job.main is not None
        copies = [report.copies for report in job.reports]
        job.drift = differing_copies(copies, job.table, self._topology.tensor)
        if job.drift is not None and not self._may_copies_differ:
            raise CheckpointError(
                f"{job.drift}; nothing was saved. The ranks have drifted apart (a gradient that was not reduced, or a "
                "fault of a device): resume from a checkpoint before that. If the library that adds up gradients is "
                "known to round them otherwise on each rank, checkpoint.differing_copies=report saves the owner's copy"
            )
        manifest = describe(job.unfinished, job.save_id, job.step, job.reports, job.main, job.table, self._topology)
        job.total_bytes = manifest.total_bytes

        def tell(fault: str) -> None:
            job.not_removed = fault

        commit(job.unfinished, manifest, self._keep_last, self._keep_every, job.pinned, tell)

    def _conclude(self, job: _Job, stall_seconds: float) -> None:
        """The checkpoint is complete: all ranks hear its figures."""
        figures: list[Any] = [None]
        if job.reports is not None:
            stall_seconds = max(stall_seconds, *(report.stall_seconds for report in job.reports))
            write_seconds = max(report.write_seconds for report in job.reports) + job.work.seconds
            figures = [(job.total_bytes, stall_seconds, write_seconds, job.drift, job.not_removed)]
        dist.broadcast_object_list(figures, src=0, group=self._topology.control_group)
        path = self._folder / retention.checkpoint_name(job.step)
        self._finished.append(FinishedSave(job.step, path, *figures[0]))
        self._job = None

    def _fail(self, job: _Job) -> None:
        """Ends a save that failed somewhere: all ranks stop, the unfinished folder goes, all raise the same."""
        job.cancel.set()
        while True:
            job.work.wait(_HEARTBEAT_SECONDS)
            if self._agree(job.work.is_done)[0]:
                break
        errors: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(errors, job.work.error, group=self._topology.control_group)
        if self._topology.rank == 0:
            shutil.rmtree(job.unfinished, ignore_errors=True)
        self._job = None
        told_by_ranks = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error not in (None, GIVEN_UP)]
        more = f"; and {len(told_by_ranks) - 3} more" if len(told_by_ranks) > 3 else ""
        text = "; ".join(told_by_ranks[:3]) + more
        raise CheckpointError(f"the save of step {job.step} failed: {text}")


def _write(
    wait_for_copies: Callable[[], None],
    unfinished: Path,
    save_id: str,
    share: RankShare,
    main: MainShare | None,
    cancel: threading.Event,
) -> None:
    wait_for_copies()
    write_share(unfinished, save_id, share, main, cancel)


def _raise(error: CheckpointError) -> None:
    raise error
