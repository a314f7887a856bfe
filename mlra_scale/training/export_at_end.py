"""The export of a run that has done all its steps, where its configuration wants one (`export.format`)."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.huggingface.card import CardDetails
from mlra_scale.checkpoint.huggingface.verification import VerificationError
from mlra_scale.checkpoint.retention import checkpoint_at
from mlra_scale.config import ExportConfig
from mlra_scale.console import InputError
from mlra_scale.parallel import Topology
from mlra_scale.publishing import hub
from mlra_scale.publishing.exporting import ExportRequest, export
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import EXPENDABLE_SECONDS, Interruption, Watchdog
from mlra_scale.training.record import EventLog
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start.request import ResolvedRun, exported_as
from mlra_scale.training.watch.text_tasks import seconds_between_signs

_AT_WORK = -1
_SECONDS_OF_A_PUSH, _SLOWEST_BYTES_PER_SECOND = 900.0, 500_000
"""A push that takes longer than this hangs; the hub's library has no time-out."""


def export_at_end(run: ResolvedRun, topology: Topology, interruption: Interruption, watchdog: Watchdog) -> ExitCode:
    """Exports the last checkpoint into the run directory, and pushes it; collective: the other ranks wait for rank 0.

    The run is complete: an export that fails is reported, with the remedy, and changes nothing else.

    Returns:
        DONE or EXPORT_FAILED, the same on every rank.
    """
    # A signal ends the processes during an export; the next start makes it.
    left = "all steps are done and saved; --resume auto makes the export, or the push, which was stopped"
    interruption.limit(EXPENDABLE_SECONDS, left, ExitCode.PREEMPTED)

    def exchange(state: int) -> int:
        watchdog.heartbeat("exporting", run.config.train.steps)
        packed = torch.tensor(state)
        if topology.world_size > 1:
            dist.broadcast(packed, src=0, group=topology.control_group)
        return int(packed)

    def give_up() -> None:
        upload = f"hf upload {run.config.export.repository} {run.directory.exported}"
        remedy = f"the run is complete, and --resume auto makes the export and the push again; or `{upload}`"
        _note_failure(run.directory, "the push hangs", remedy)
        exchange(ExitCode.EXPORT_FAILED)
        dist.barrier()  # the one before which no rank ends, see trainer.launch
        os._exit(ExitCode.EXPORT_FAILED)  # this rank's main thread, and those of the hub's library, do not end

    if topology.rank == 0:
        with _Signs(lambda: exchange(_AT_WORK), seconds_between_signs(run.config), give_up) as signs:
            state = int(_export(run.config.export, run.directory, signs.limit))
        exchange(state)
    else:
        while (state := exchange(_AT_WORK)) == _AT_WORK:
            pass
    return ExitCode(state)


def _export(wanted: ExportConfig, directory: RunDirectory, limit: Callable[[float], None]) -> ExitCode:
    try:
        save_id, url = _export_and_push(wanted, directory, limit)
        _record(directory, "exported", path=str(directory.exported), repository=url, **exported_as(wanted, save_id))
    except Exception as error:  # whatever it is, the run is complete, and all ranks end with one exit code
        if not isinstance(error, InputError | VerificationError | OSError):
            traceback.print_exc()
        remedy = "the run is complete, and --resume auto makes the export again"
        if not isinstance(error, hub.HubError):  # whose message has its own remedy: the folder is there
            remedy += f"; so does `mlra-scale export {directory.path} FOLDER`"
        _note_failure(directory, str(error) or type(error).__name__, remedy)
        return ExitCode.EXPORT_FAILED
    return ExitCode.DONE


def _note_failure(directory: RunDirectory, reason: str, remedy: str) -> None:
    print(f"export failed: {reason}\n  {remedy}", flush=True)
    with contextlib.suppress(OSError):
        _record(directory, "export_failed", reason=reason)


def _record(directory: RunDirectory, event: str, **values: Any) -> None:
    with contextlib.closing(EventLog(directory.events)) as events:
        events.event(event, **values)


def _export_and_push(
    wanted: ExportConfig, directory: RunDirectory, limit: Callable[[float], None]
) -> tuple[str, str | None]:
    """Exports the newest checkpoint, and pushes it where a repository is named.

    Returns:
        Which checkpoint it was (save_id), and the address of the repository.
    """
    assert wanted.format is not None

    def say(line: str) -> None:
        print(f"export: {line}", flush=True)

    card = CardDetails(wanted.repository, wanted.license, wanted.languages, wanted.datasets)
    checkpoint, target = checkpoint_at(directory.path), directory.exported
    save_id = Store.open(checkpoint).manifest.save_id
    export(ExportRequest(checkpoint, target, wanted.format, wanted.dtype, is_replacing=True, card=card), say)
    if wanted.repository is None:
        return save_id, None
    size = sum(file.stat().st_size for file in target.iterdir())
    limit(_SECONDS_OF_A_PUSH + size / _SLOWEST_BYTES_PER_SECOND)
    return save_id, hub.push(target, wanted.repository, wanted.private, say)


class _Signs:
    """Gives a sign from a thread, at once and every so many seconds, until the block ends: an export takes minutes.

    Where it takes longer than a limit it hangs, and `give_up` is called in that thread.
    """

    def __init__(self, sign: Callable[[], object], seconds: float, give_up: Callable[[], object]) -> None:
        self._sign, self._seconds, self._give_up = sign, seconds, give_up
        self._is_over, self._end = threading.Event(), math.inf
        self._thread = threading.Thread(target=self._run, name="export", daemon=True)

    def limit(self, seconds: float) -> None:
        """Sets how long signs are given from now on."""
        self._end = time.monotonic() + seconds

    def _run(self) -> object:
        self._sign()
        while not self._is_over.wait(self._seconds):
            if time.monotonic() > self._end:
                return self._give_up()
            self._sign()
        return None

    def __enter__(self) -> _Signs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
