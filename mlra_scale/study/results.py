"""What a sweep leaves behind, and how it is written so that neither a kill nor a second process loses any of it.

sweep.yaml               the study, with the overrides of the command line
study.json               where it ran: commit, command, hardware, versions, times
results.jsonl            one object per finished cell, in the order of the grid
cells/NAME/              the run directory of a cell, as `mlra_scale.train` makes it, and beside that:
cells/NAME/result.json   its line of results.jsonl
cells/NAME/output.log    what its processes printed
cells/NAME/.cell.lock    held by the process that runs the cell, and by the run itself

The result of a cell is a file of its own, which only the holder of the cell's lock writes, in one atomic replacement.
results.jsonl is put together from those files, under a lock, by whoever has finished a cell: it can be made again at
any time.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from mlra_scale.config import ConfigError, Problem
from mlra_scale.config.json_text import parse_json, read_json_object
from mlra_scale.files import lock, write_atomically
from mlra_scale.study.grid import Cell, Study, load_study
from mlra_scale.study.provenance import note_end
from mlra_scale.study.statistics import num_shallow
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.record import finite_or_none, lines_from_end, read_record
from mlra_scale.training.resume import FREE, flat, is_in, read_stored
from mlra_scale.training.run_directory import RunDirectory

State = Literal["done", "diverged", "failed"]

_DIVERGED = (ExitCode.NON_FINITE, ExitCode.UNSTABLE)
"""The loss is no number any more; the guard has given up (7)."""
_ENDS = ("finished", "stopped", "preempted", "interrupted", "failed")
_MAY_DIFFER = tuple(name for name in FREE if not name.startswith("data."))
"""Where and how a cell is computed. Other data are another experiment, wherever they lie."""
_SPIKE_HORIZON = 10_000
"""Steps that the spike score of OLMo-core is a share of, at most."""


@dataclass(frozen=True)
class CellFiles:
    """The files of one cell.

    Attributes:
        cell: The cell.
        run: Its run directory.
    """

    cell: Cell
    run: RunDirectory

    @property
    def result(self) -> Path:
        """Its line of results.jsonl."""
        return self.run.path / "result.json"

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.run.path / "output.log"

    @property
    def lock(self) -> Path:
        """Held while it is at work."""
        return self.run.path / ".cell.lock"

    def read_result(self) -> dict[str, Any] | None:
        """Returns its result, or None where it has none yet.

        Raises:
            ConfigError: It is damaged.
        """
        if not self.result.exists():
            return None
        try:
            result = read_json_object(self.result)
            if not isinstance(result.get("state"), str):
                raise ValueError(f"{self.result} lacks the state of the cell")
        except ValueError as error:
            remedy = f"{error}; remove the file: the result is made again from the record of the run"
            raise ConfigError([Problem(f"cell {self.cell.name}", str(self.result), remedy)]) from None
        return result

    def is_done(self) -> bool:
        """Returns whether it has a result that stands; a cell that failed is tried again."""
        result = self.read_result()
        return result is not None and result["state"] != "failed"

    def last_step(self) -> int:
        """Returns the last step that the run has recorded."""
        try:
            with self.run.metrics.open("rb") as file:
                for line in lines_from_end(file):
                    with contextlib.suppress(ValueError, TypeError, KeyError):
                        return int(parse_json(line, "the line", allow_nan=True)["step"])
        except (FileNotFoundError, NotADirectoryError):
            pass
        return 0


class SweepDirectory:
    """The output folder of a sweep.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study, self.about, self.results = path / "sweep.yaml", path / "study.json", path / "results.jsonl"

    def files(self, cell: Cell) -> CellFiles:
        """Returns the files of a cell."""
        return CellFiles(cell, RunDirectory(self.path / "cells" / cell.name))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and keeps other processes of the sweep from its common files until the end of the block."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".sweep.lock").open("a", encoding="ascii")
        except OSError as error:
            remedy = f"cannot be written ({error.strerror}); name another folder"
            raise ConfigError([Problem("--output", str(self.path), remedy)]) from error
        with file:
            lock(file.fileno(), math.inf)
            yield

    def read_study(self) -> Study | None:
        """Returns the study that the folder holds, or None.

        Raises:
            ConfigError: It cannot be read.
        """
        return load_study(self.study) if self.study.exists() else None

    def write_study(self, study: Study) -> None:
        """Writes sweep.yaml; the lock is held."""
        write_atomically(self.study, study.to_yaml())

    def stale(self, cells: Sequence[Cell]) -> list[str]:
        """Returns the names of cells that have a result here and are not in this grid."""
        names = {cell.name for cell in cells}
        found = (file.parent.name for file in self.path.glob("cells/*/result.json"))
        return sorted(name for name in found if name not in names)

    def collect(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Puts results.jsonl together from the results of the cells.

        Args:
            cells: The whole grid.

        Returns:
            The results that there are, in the order of the grid.
        """
        with self.locked():
            results = [result for cell in cells if (result := self.files(cell).read_result()) is not None]
            write_atomically(self.results, "".join(json.dumps(result) + "\n" for result in results))
            if len(results) == len(cells):
                note_end(self.about)
        return results


def claim(files: CellFiles) -> IO[Any] | None:
    """Makes the directory of a cell and takes its lock; returns the open file that holds it, or None if it is held."""
    files.run.path.mkdir(parents=True, exist_ok=True)
    file = files.lock.open("a", encoding="ascii")
    try:
        lock(file.fileno())  # without locks, as some cluster file systems are, the cells of a sweep are started once
    except BlockingIOError:
        file.close()
        return None
    return file


def changes_of(files: CellFiles) -> list[Problem]:
    """Finds out whether a cell that has been run, or begun, has another configuration now."""
    path, name = files.run.config, files.cell.name
    if not path.exists():
        return []
    try:
        was = flat(read_stored(path).to_dict())
    except ConfigError as error:
        return [Problem(f"cell {name}", str(path), problem.remedy) for problem in error.problems]
    now = flat(files.cell.config.to_dict())
    remedy = f"the cell ran with {{}}; name another --output, or remove {files.run.path} to run it anew"
    return [
        Problem(f"cell {name}: {field}", now.get(field), remedy.format(was.get(field)))
        for field in {**was, **now}
        if was.get(field) != now.get(field) and not is_in(_MAY_DIFFER, field)
    ]


def num_events(run: RunDirectory) -> int:
    """Returns how many events a run has recorded."""
    return len(_events(run))


def _events(run: RunDirectory) -> list[dict[str, Any]]:
    """Returns the events of a run; none where the log is damaged: the run then is continued, which says so."""
    try:
        return read_record(run.events, "event")
    except ValueError:
        return []


def ending_of(run: RunDirectory, after: int = 0) -> dict[str, Any]:
    """Returns the event that the newest start of a run ended with; empty where it has said nothing.

    Args:
        run: Its directory.
        after: So many events belong to earlier starts.
    """
    for event in reversed(_events(run)[after:]):
        if event["event"] in _ENDS:
            return event
        if event["event"] == "start":
            break
    return {}


def state_of(ending: Mapping[str, Any]) -> Literal["done", "diverged"] | None:
    """Returns the state of a cell whose run ended with this event, or None if that is no result."""
    if ending.get("event") == "finished":
        return "done"
    if ending.get("event") == "stopped" and ending.get("exit_code") in _DIVERGED:
        return "diverged"
    return None


def result_of(
    files: CellFiles, state: State, ending: Mapping[str, Any], error: str | None, commit: str | None
) -> dict[str, Any]:
    """Reads the record of a run and returns the cell's result.

    Args:
        files: The cell.
        state: How it ended.
        ending: The event that it ended with.
        error: Of a failed cell, what went wrong.
        commit: Of the code of this start, for a run that has not recorded any.

    Returns:
        `steps` is the last step reached and `diverged_at` that step for a cell that diverged; `final_loss` is the mean
        training loss over the last tenth of those steps (of those of them that are recorded: see train.log_every);
        `seconds` is time in training, over all starts, without what it takes to start; the others are the last
        recorded values, and null, or left out where a `?` stands in the contract, if there are none.
    """
    try:
        records = read_record(files.run.metrics, "step")
        return _result(files, state, ending, error, commit, records)
    except (ValueError, TypeError, LookupError, AttributeError) as fault:
        reason = str(fault) if str(files.run.metrics) in str(fault) else f"{files.run.metrics}: {fault!r}"
        return _result(files, "failed", {}, f"the record cannot be read: {reason}", commit, [])


def _result(
    files: CellFiles,
    state: State,
    ending: Mapping[str, Any],
    error: str | None,
    commit: str | None,
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    cell = files.cell
    reached = max((record["step"] for record in records), default=0)
    steps = int(ending.get("step") or reached) if state == "diverged" else reached
    train = cell.config.train
    losses = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    result: dict[str, Any] = {
        "cell": cell.name,
        "variant": cell.variant,
        "axes": dict(cell.axes),
        "seed": cell.seed,
        "run": f"cells/{cell.name}",
        "state": state,
        "steps": steps,
        "final_loss": _mean_of_last_tenth(losses, steps),
        "initial_loss": losses[0][1] if losses else None,
        **{name: _last(records, name) for name in ("validation_loss", "tev_mean", "tev_std")},
    }
    if (gradients := _last(records, "gradients")) is not None:
        if "embedding" in gradients["kinds"]:
            result["gradient_variance_embedding"] = gradients["kinds"]["embedding"]["gradient_variance"]
        if (variances := gradients.get("layers", {}).get("gradient_variance")) and None not in variances:
            shallow = variances[: num_shallow(len(variances))]
            result["gradient_variance_shallow"] = math.fsum(shallow) / len(shallow)
    if (activations := _last(records, "activations")) is not None:
        result["residual_variance"] = activations["residual_variance"][-1]
    if (scores := _last(records, "spike_scores")) is not None:
        result["spikes"] = round(scores["loss_olmo_core"] * min(reached, _SPIKE_HORIZON))
    result |= {
        "diverged_at": steps if state == "diverged" else None,
        "seconds": round(_seconds(records), 3),
        "tokens": steps * train.global_batch_size * train.sequence_length,
        "error": error,
        "commit": _commits(_events(files.run)) or commit,
    }
    return {name: finite_or_none(value) for name, value in result.items()}


def _commits(events: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the commits of all starts of a run, which a resumed one may have several of."""
    found = {event["commit"]: None for event in events if event["event"] == "start" and event.get("commit")}
    return ", ".join(found) or None


def _last(records: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)


def _mean_of_last_tenth(losses: Sequence[tuple[int, float]], steps: int) -> float | None:
    if not losses:
        return None
    first = steps - math.ceil(steps / 10) + 1
    values = [loss for step, loss in losses if step >= first] or [losses[-1][1]]
    return math.fsum(values) / len(values)


def _seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Adds up the clocks of all starts: each begins at 0 and its lines are in order."""
    clocks = [float(record["seconds"]) for record in records]
    return sum(clock for clock, later in zip(clocks, [*clocks, -1.0][1:], strict=True) if later < clock)


def write_result(files: CellFiles, result: Mapping[str, Any], keep_checkpoints: bool) -> None:
    """Removes what is not needed any more and writes the result of a cell.

    In this order: killed in between, the next sweep makes the result from the record, which says how the run ended.

    Args:
        files: The cell; its lock is held.
        result: What `result_of` returned.
        keep_checkpoints: Whether its checkpoints stay. Those of a failed cell do: it goes on from them.
    """
    folder = files.run.checkpoints
    # A link leads to a place that is not ours.
    if result["state"] != "failed" and not keep_checkpoints and folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    write_atomically(files.result, json.dumps(result, indent=1) + "\n")
