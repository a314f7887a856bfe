"""The console output of a sweep: the list of its cells, its progress, a line per finished cell, a summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from mlra_scale.console import table
from mlra_scale.study.grid import Cell
from mlra_scale.study.results import CellFiles, SweepDirectory
from mlra_scale.study.sweep import RunningCell, Sweep

_MIB = 2.0**20
_CHECKPOINT_BYTES = 12
"""Bytes of a parameter in a checkpoint: its fp32 weight and two moments."""


def plan_text(sweep: Sweep, chosen: Sequence[Cell], jobs: int) -> str:
    """Returns a list of chosen cells, and an estimate for those that would be run, some jobs at once."""
    study, files = sweep.study, {cell.index: sweep.directory.files(cell) for cell in sweep.cells}
    factors = [f"{len(study.variants)} variant(s)", *(f"{len(values)} {axis}" for axis, values in study.axes.items())]
    rows = [
        (
            *(str(cell.index), cell.name, f"{cell.config.model.num_parameters():,}", f"{cell.config.train.steps:,}"),
            *(f"{cell.tokens:,}", f"{cell.flops / 1e12:,.2f}", _state(files[cell.index])),
        )
        for cell in chosen
    ]
    to_do = [cell for cell in chosen if not files[cell.index].is_done()]
    tokens, flops = sum(cell.tokens for cell in to_do), sum(cell.flops for cell in to_do)
    largest = max((cell.config.model.num_parameters() for cell in to_do), default=0) * _CHECKPOINT_BYTES / _MIB
    fate = "are removed when its result is written" if study.checkpoints == "discard" else "stay"
    return "\n".join(
        [
            f"{study.name}: {len(files)} cells = {' x '.join([*factors, f'{len(study.seeds)} seed(s)'])}",
            f"preset {study.preset}, {study.ranks} process(es) a cell, output {sweep.directory.path}",
            "",
            table(("#", "cell", "parameters", "steps", "tokens", "TFLOP", "state"), rows, left=2),
            "",
            f"to do: {len(to_do)} of {len(chosen)} cells, {tokens:,} tokens, {flops / 1e12:,.2f} TFLOP",
            f"disk: a checkpoint takes {largest:,.0f} MiB at most; those of a cell {fate}",
            _time_text(flops, len(to_do), list(files.values()), jobs),
        ]
    )


def _state(files: CellFiles) -> str:
    result = files.read_result()
    if result is not None:
        return str(result["state"]) + (", to be run again" if result["state"] == "failed" else "")
    step = files.last_step()
    return f"begun, step {step}" if step else "to do"


def _time_text(flops: float, num_cells: int, files: Sequence[CellFiles], jobs: int) -> str:
    """Returns an estimate of the time from cells that are done, in proportion to their operations."""
    found = [(one.cell.flops, one.read_result() or {}) for one in files]
    done = [(own, result["seconds"]) for own, result in found if result.get("state") == "done" and result["seconds"]]
    if not done:
        return "time: unknown until a cell is done; then this list has an estimate"
    seconds = flops * sum(seconds for _, seconds in done) / sum(own for own, _ in done) / min(jobs, max(num_cells, 1))
    return (
        f"time: about {duration(seconds)} with --jobs {jobs}, at the rate of the cells that are done, without start-up"
    )


def duration(seconds: float) -> str:
    """Returns a length of time for people."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """The progress of a sweep: a bar on a terminal, and a line for each finished cell.

    The bar counts floating-point operations, since cells of different depth take different times.

    Args:
        cells: The cells to run.
        output: The output folder.
    """

    def __init__(self, cells: Sequence[Cell], output: SweepDirectory) -> None:
        self._total, self._num_finished, self._started = len(cells), 0, time.monotonic()
        self._flops = {cell.name: cell.flops for cell in cells}
        self._shares = {cell.name: _share(output.files(cell)) for cell in cells}
        self._initial = self._work()
        self._bar = tqdm(
            total=sum(self._flops.values()),
            initial=self._initial,
            smoothing=0.0,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty() or not cells,
        )
        self._announced: set[str] = set()
        self._refresh([])

    def _work(self) -> float:
        return sum(self._flops[name] * share for name, share in self._shares.items())

    def on_poll(self, running: Sequence[RunningCell], locked: Collection[str]) -> None:
        """Updates the bar, and lists once the cells that other processes hold."""
        if new := [name for name in locked if name not in self._announced]:
            self._announced.update(new)
            self.print(f"waiting for {', '.join(new)}: run by another sweep, or by a run whose sweep was killed")
        self._shares |= {one.files.cell.name: _share(one.files) for one in running}
        self._refresh(running)

    def _refresh(self, running: Sequence[RunningCell]) -> None:
        if not self._bar.disable:
            self._bar.set_description_str(f"{self._num_finished}/{self._total} cells", refresh=False)
            self._bar.set_postfix_str(" | ".join(one.files.cell.name for one in running), refresh=False)
            self._bar.n = self._work()
            self._bar.refresh()

    def on_result(self, result: Mapping[str, Any], seconds: float) -> None:
        """Prints the line of a finished cell."""
        self._shares[result["cell"]] = 1.0
        self._num_finished += 1
        work, elapsed = self._work() - self._initial, time.monotonic() - self._started
        left = sum(self._flops.values()) - self._initial - work
        ahead = f", about {duration(elapsed * left / work)} left" if work > 0 and left > 0 else ""
        counter = f"[{self._num_finished:>{len(str(self._total))}}/{self._total}]"
        self.print(f"{counter} {result_line(result)}, {duration(seconds)}{ahead}")

    def print(self, text: str) -> None:
        """Prints above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def _share(files: CellFiles) -> float:
    return min(1.0, files.last_step() / files.cell.config.train.steps)


def result_line(result: Mapping[str, Any]) -> str:
    """Returns a result in one line."""
    text = f"{result['cell']}: {result['state']}"
    if result["state"] == "diverged":
        text += f" at step {result['diverged_at']}"
    if result["state"] == "failed":
        return f"{text}: {str(result['error']).splitlines()[-1]}"
    for name, key in (("loss", "final_loss"), ("validation", "validation_loss")):
        if result[key] is not None:
            text += f", {name} {result[key]:.4f}"
    return text


def summary_text(sweep: Sweep) -> str:
    """Returns the number of results, and what is missing."""
    files = {cell.name: sweep.directory.files(cell) for cell in sweep.cells}
    states = {name: result["state"] for name, one in files.items() if (result := one.read_result()) is not None}
    found = [*states.values()]
    counts = ", ".join(f"{found.count(state)} {state}" for state in ("done", "diverged", "failed") if state in found)
    lines = [f"{len(found)} of {len(files)} cells have a result ({counts or 'none'}): {sweep.directory.results}"]
    lines += [f"failed: {name}: see {files[name].log}" for name, state in states.items() if state == "failed"]
    lines += [f"not written: {name}: {reason}" for name, reason in sweep.unwritten.items()]
    if locked := [name for name in sweep.locked_elsewhere if name not in states]:
        lines.append(f"still run by another process: {', '.join(locked)}; the same command takes them over")
    if sweep.interrupted:
        lines.append(f"interrupted: {', '.join(sweep.interrupted)}; the same command continues them")
    return "\n".join(lines)
