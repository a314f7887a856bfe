"""What a sweep tells: the list of its cells before it starts, a progress bar, and a line for every cell that ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from mlra_scale.study.grid import Cell, Study
from mlra_scale.study.results import CellFiles, SweepDirectory
from mlra_scale.study.sweep import Running, Sweep

_MIB = 2.0**20
_CHECKPOINT_BYTES = 12
"""Of a parameter in a checkpoint: its fp32 weight and two moments."""


def plan_text(study: Study, cells: Sequence[Cell], chosen: Sequence[Cell], output: SweepDirectory, jobs: int) -> str:
    """Returns the list of cells with what each takes, and an estimate for those that are to be run.

    Args:
        study: The study.
        cells: Its whole grid.
        chosen: Cells that would be run, if they have no result yet.
        output: Where results are, or will be.
        jobs: How many would be run at once.
    """
    files = {cell.index: output.files(cell) for cell in cells}
    width = max(len(cell.name) for cell in chosen)
    lines = [
        f"{study.name}: {len(cells)} cells = {len(study.variants)} variant(s) x "
        + " x ".join(
            [*(f"{len(values)} {axis}" for axis, values in study.axes.items()), f"{len(study.seeds)} seed(s)"]
        ),
        f"preset {study.preset}, {study.ranks} process(es) a cell, output {output.path}",
        "",
        f"{'#':>4}  {'cell':<{width}}  {'parameters':>13}  {'steps':>7}  {'tokens':>13}  {'TFLOP':>10}  state",
    ]
    for cell in chosen:
        parameters, steps = cell.config.model.num_parameters(), cell.config.train.steps
        numbers = f"{parameters:>13,}  {steps:>7,}  {cell.tokens:>13,}  {cell.flops / 1e12:>10,.2f}"
        lines.append(f"{cell.index:>4}  {cell.name:<{width}}  {numbers}  {_state(files[cell.index])}")
    to_do = [cell for cell in chosen if not files[cell.index].is_done()]
    largest = max((cell.config.model.num_parameters() for cell in to_do), default=0) * _CHECKPOINT_BYTES / _MIB
    stays = "go when its result is written" if study.checkpoints == "discard" else "stay"
    return "\n".join(
        [
            *lines,
            "",
            f"to do: {len(to_do)} of {len(chosen)} cells, {sum(cell.tokens for cell in to_do):,} tokens, "
            f"{sum(cell.flops for cell in to_do) / 1e12:,.2f} TFLOP",
            f"disk: a checkpoint takes {largest:,.0f} MiB at most; those of a cell {stays}",
            _time_text(to_do, [files[cell.index] for cell in cells], jobs),
        ]
    )


def _state(files: CellFiles) -> str:
    result = files.read_result()
    if result is not None:
        return str(result["state"]) + (", to be tried again" if result["state"] == "failed" else "")
    step = files.last_step()
    return f"begun, step {step}" if step else "to do"


def _time_text(to_do: Sequence[Cell], files: Sequence[CellFiles], jobs: int) -> str:
    """Estimates the time from cells that are done, in proportion to their operations."""
    flops = seconds = 0.0
    for one in files:
        result = one.read_result()
        if result is not None and result["state"] == "done" and result["seconds"]:
            flops, seconds = flops + one.cell.flops, seconds + result["seconds"]
    if not flops:
        return "time: unknown until a cell is done; then this list has an estimate"
    left = sum(cell.flops for cell in to_do) * seconds / flops / min(jobs, max(len(to_do), 1))
    return (
        f"time: about {duration(left)} with --jobs {jobs}, at the rate of the cells that are done; starting them aside"
    )


def duration(seconds: float) -> str:
    """Returns a length of time for people."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Board:
    """The progress of a sweep: a bar on a terminal, and everywhere a line for each cell that ended.

    The bar counts floating-point operations, since cells of different depth take different times.

    Args:
        cells: What is to be done.
        output: Where.
    """

    def __init__(self, cells: Sequence[Cell], output: SweepDirectory) -> None:
        self._total, self._ended, self._started = len(cells), 0, time.monotonic()
        self._flops = {cell.name: cell.flops for cell in cells}
        self._done = {cell.name: _share(output.files(cell)) for cell in cells}
        self._before = self._work()
        self._bar = tqdm(
            total=sum(self._flops.values()),
            initial=self._before,
            smoothing=0.0,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty() or not cells,
        )
        self._waited_for: set[str] = set()
        self._show([])

    def _work(self) -> float:
        return sum(self._flops[name] * share for name, share in self._done.items())

    def watch(self, running: Sequence[Running], elsewhere: Collection[str] = ()) -> None:
        """Moves the bar to where the runs are, and says once which cells are waited for."""
        if new := [name for name in elsewhere if name not in self._waited_for]:
            self._waited_for.update(new)
            self.say(f"at work elsewhere, and waited for: {', '.join(new)} (another sweep, or a run that outlived one)")
        for one in running:
            self._done[one.files.cell.name] = _share(one.files)
        self._show(running)

    def _show(self, running: Sequence[Running]) -> None:
        if not self._bar.disable:
            self._bar.set_description_str(f"{self._ended}/{self._total} cells", refresh=False)
            self._bar.set_postfix_str(" | ".join(one.files.cell.name for one in running), refresh=False)
            self._bar.n = self._work()
            self._bar.refresh()

    def told(self, result: Mapping[str, Any], seconds: float) -> None:
        """Prints the line of a cell that ended."""
        self._done[result["cell"]] = 1.0
        self._ended += 1
        work, spent = self._work() - self._before, time.monotonic() - self._started
        left = sum(self._flops.values()) - self._before - work
        ahead = f", about {duration(spent * left / work)} left" if work > 0 and left > 0 else ""
        width = len(str(self._total))
        self.say(f"[{self._ended:>{width}}/{self._total}] {result_line(result)}, {duration(seconds)}{ahead}")

    def say(self, text: str) -> None:
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


def summary_text(output: SweepDirectory, cells: Sequence[Cell], sweep: Sweep) -> str:
    """Returns what there is now, and what is missing."""
    results = {cell.name: result for cell in cells if (result := output.files(cell).read_result()) is not None}
    states = [result["state"] for result in results.values()]
    counts = [f"{states.count(state)} {state}" for state in ("done", "diverged", "failed") if state in states]
    lines = [f"{len(results)} of {len(cells)} cells have a result ({', '.join(counts) or 'none'}): {output.results}"]
    for cell in cells:
        if results.get(cell.name, {}).get("state") == "failed":
            lines.append(f"failed: {cell.name}: see {output.files(cell).log}")
    lines += [f"not written: {name}: {reason}" for name, reason in sweep.unwritten.items()]
    if elsewhere := [name for name in sweep.held_elsewhere if name not in results]:
        lines.append(f"still at work elsewhere: {', '.join(elsewhere)}; the same command takes them over")
    if sweep.interrupted:
        lines.append(f"interrupted: {', '.join(sweep.interrupted)}; the same command goes on with them")
    return "\n".join(lines)
