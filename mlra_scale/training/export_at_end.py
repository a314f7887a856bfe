"""The export of a run that has done all its steps, where its configuration wants one (`export.format`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from mlra_scale.checkpoint.huggingface.card import CardDetails
from mlra_scale.checkpoint.huggingface.verification import VerificationError
from mlra_scale.config import ExportConfig
from mlra_scale.console import InputError
from mlra_scale.parallel import Topology
from mlra_scale.publishing import hub
from mlra_scale.publishing.exporting import ExportRequest, export
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import EXPENDABLE_SECONDS, Interruption, Watchdog
from mlra_scale.training.record import EventLog
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start.request import ResolvedRun

_AT_WORK = -1
_MOST_SECONDS_BETWEEN_SIGNS = 20.0


def export_at_end(run: ResolvedRun, topology: Topology, interruption: Interruption, watchdog: Watchdog) -> ExitCode:
    """Exports the last checkpoint into the run directory, and pushes it; collective: the other ranks wait for rank 0.

    The run is complete: an export that fails is reported, with the remedy, and changes nothing else.

    Returns:
        DONE or EXPORT_FAILED, the same on every rank.
    """
    # A signal ends the processes during an export; the next start makes it.
    left = "all steps are done and saved; --resume auto makes the export, which was stopped"
    interruption.limit(EXPENDABLE_SECONDS, left, ExitCode.PREEMPTED)

    def exchange(state: int) -> int:
        watchdog.heartbeat("exporting", run.config.train.steps)
        packed = torch.tensor(state)
        if topology.world_size > 1:
            dist.broadcast(packed, src=0, group=topology.control_group)
        return int(packed)

    # A quarter of what a collective may wait, and half of what a watchdog does.
    seconds = min(_MOST_SECONDS_BETWEEN_SIGNS, 60.0 * run.config.parallel.timeout_minutes / 4)
    if topology.rank == 0:
        with _repeated(lambda: exchange(_AT_WORK), seconds):
            state = int(_export(run.config.export, run.directory))
        exchange(state)
    else:
        while (state := exchange(_AT_WORK)) == _AT_WORK:
            pass
    return ExitCode(state)


def _export(wanted: ExportConfig, directory: RunDirectory) -> ExitCode:
    events = EventLog(directory.events)
    try:
        url = _export_and_push(wanted, directory.path, directory.exported)
    except (InputError, VerificationError, OSError) as error:
        print(f"export failed: {error}\n  the run is complete; export it with tools/export_hf.py", flush=True)
        events.event("export_failed", reason=str(error))
        return ExitCode.EXPORT_FAILED
    else:
        events.event("exported", path=str(directory.exported), repository=url)
        return ExitCode.DONE
    finally:
        events.close()


def _export_and_push(wanted: ExportConfig, run: Path, target: Path) -> str | None:
    """Exports, and pushes where a repository is named, whose address is returned."""
    assert wanted.format is not None

    def say(line: str) -> None:
        print(f"export: {line}", flush=True)

    card = CardDetails(wanted.repository, wanted.license, wanted.languages, wanted.datasets)
    export(ExportRequest(run, target, wanted.format, wanted.dtype, is_replacing=True, card=card), say)
    return None if wanted.repository is None else hub.push(target, wanted.repository, wanted.private, say)


@contextmanager
def _repeated(sign: Callable[[], int], seconds: float) -> Iterator[None]:
    """Gives a sign from a thread, at once and every so many seconds: an export may take minutes."""
    is_over = threading.Event()

    def run() -> None:
        sign()
        while not is_over.wait(seconds):
            sign()

    thread = threading.Thread(target=run, name="export", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
