"""The list of runs as text for people, and as objects for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlra_scale import console
from mlra_scale.cluster.job_file import JobAttempt, JobFile
from mlra_scale.cluster.messages import printable
from mlra_scale.cluster.runs import RunRow, timestamp
from mlra_scale.training.run_directory import RunDirectory

_HEADER = ["RUN", "STATE", "JOB", "NODES x RANKS", "STEP", "LOSS", "TEV", "TOKENS/S", "RESTARTS", "AGE"]
_LEAST_ROOM = 30
"""Columns without which an error has a line of its own."""


def as_json(runs: Sequence[RunRow]) -> dict[str, Any]:
    """Returns the rows for programs."""
    return {"runs": [_fields(run) for run in runs]}


def _fields(run: RunRow) -> dict[str, Any]:
    return {name: value for name, value in vars(run).items() if name != "job"}


def table(runs: Sequence[RunRow], width: int | None = None) -> str:
    """Returns the rows for people.

    Args:
        runs: The rows.
        width: Of the terminal: errors are cut to it, and stand in a line of their own where there is no room beside
            the other columns. None: nothing is cut.
    """
    head, *rows = console.table(_HEADER, map(_cells, runs), left=2, width=None).splitlines()
    room = 0 if width is None else width - len(head) - 2
    lines = [f"{head}  LAST ERROR" if width is None or room >= _LEAST_ROOM else head]
    for row, run in zip(rows, runs, strict=True):
        trouble = printable("; ".join(filter(None, [*run.unreadable, run.last_error])))
        if width is None or not trouble:
            lines.append(f"{row}  {trouble}".rstrip())
        elif room >= _LEAST_ROOM:
            lines.append(f"{row}  {_cut(trouble, room)}")
        else:
            lines += [row, f"    {_cut(trouble, width - 4)}"]
    return "\n".join(lines)


def _shown(value: Any, format: str = "", unit: str = "") -> str:
    return "-" if value is None else f"{value:{format}}{unit}"


def _cells(run: RunRow) -> list[str]:
    return [
        printable(run.name),
        printable(f"{run.state} ({run.waits_for})" if run.waits_for else run.state),
        printable(_shown(run.job_id)),
        f"{run.nodes} x {run.ranks // run.nodes}" if run.nodes and run.ranks else _shown(run.ranks),
        f"{_shown(run.step)}/{_shown(run.steps)}",
        _shown(run.loss, ".4f"),
        "-" if run.tev_mean is None else f"{run.tev_mean:.5f} +- {_shown(run.tev_std, '.5f')}",
        _shown(run.tokens_per_second, ",.0f"),
        f"{run.restarts} ({run.requeues} requeued)" if run.requeues else str(run.restarts),
        _duration(run.age_seconds),
    ]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(0, room - 3)]}..."


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for size, unit, longest in ((1, "s", 100), (60, "min", 100 * 60), (3600, "h", 48 * 3600)):
        if seconds < longest:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def attempts_as_json(run: RunRow, now: float) -> dict[str, Any]:
    """Returns the run with all its attempts, and the nodes that it does not use any more."""
    job = run.job or JobFile(RunDirectory(Path(run.path)).job)
    attempts = [
        {**dataclasses.asdict(attempt), "duration_seconds": _seconds_of(attempt, run, now)} for attempt in job.attempts
    ]
    more = {"command": job.command, "console": job.console or None, "excluded": job.excluded}
    return {**_fields(run), "reason": job.reason or None, "attempts": attempts, **more}


def _seconds_of(attempt: JobAttempt, run: RunRow, now: float) -> float | None:
    """How long an attempt took, or has taken so far; None where its end is not known."""
    started, ended = timestamp(attempt.started), timestamp(attempt.ended)
    if ended is None and attempt.ended is None and run.state in ("pending", "running", "suspended"):
        ended = now
    return None if started is None or ended is None else max(0.0, round(ended - started, 1))


def attempts_as_text(run: RunRow, now: float) -> str:
    """Returns the attempts of a run as lines for people, every reason in full."""
    lines = table([run]).splitlines()
    if run.job is None:
        return "\n".join([*lines, "no attempts are recorded: it was not started as a job of a cluster"])
    headers = ["ATTEMPT", "STARTED", "DURATION", "FIRST STEP AFTER", "END", "PROGRESSED", "RANKS", "NODES"]
    rows = [
        [
            str(attempt.number),
            printable(attempt.started),
            _duration(_seconds_of(attempt, run, now)),
            _shown(attempt.first_step_seconds, ".1f", " s"),
            printable(attempt.end or "-"),
            "yes" if attempt.has_progressed else "no",
            str(attempt.num_ranks),
            printable(" ".join(attempt.nodes)),
        ]
        for attempt in run.job.attempts
    ]
    head, *texts = console.table(headers, rows, left=0, width=None).splitlines()
    lines += ["", head]
    for attempt, text in zip(run.job.attempts, texts, strict=True):
        lines += [text, *(f"    {printable(reason)}" for reason in [attempt.reason, *attempt.failures] if reason)]
    if run.job.excluded:
        lines += ["", "nodes that are not used any more"]
        lines += [f"    {printable(f'{node}: {reason}')}" for node, reason in run.job.excluded.items()]
    return "\n".join(lines)
