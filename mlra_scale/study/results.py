"""The output folder of a sweep, and the result of a cell.

sweep.yaml               the study, with the overrides of the command line
study.json               where it ran: commit, command, hardware, versions, times (provenance.py)
results.jsonl            one object per finished cell, in the order of the grid
cells/NAME/              the run directory of a cell, as `mlra_scale.train` writes it, and beside that:
cells/NAME/result.json   its line of results.jsonl
cells/NAME/output.log    standard output and error of its processes
cells/NAME/.cell.lock    locked by the process that runs the cell, and by the run itself

Only the holder of a cell's lock writes its result.json, in one atomic replacement. results.jsonl is made from these
files, under the lock of the sweep, whenever a cell is finished: neither a kill nor a second process loses a result.
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
from mlra_scale.config.json_text import read_json_object
from mlra_scale.files import lock, write_atomically
from mlra_scale.study.grid import Cell, Study, load_study
from mlra_scale.study.provenance import note_end
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.record import finite_or_none, read_record
from mlra_scale.training.resume import FREE, flat, is_in, read_stored
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.run_reader import last_start_or_end, last_values, value_at

State = Literal["done", "diverged", "failed"]
Record = Mapping[str, Any]

_DIVERGED = (ExitCode.NON_FINITE, ExitCode.UNSTABLE)
_MAY_DIFFER = tuple(name for name in FREE if not name.startswith("data."))
"""Fields for where and how a cell is computed. Other data are another experiment, wherever they are stored."""
_SPIKE_HORIZON = 10_000
"""Number of steps that the spike score of OLMo-core is a share of, at most."""


@dataclass(frozen=True)
class CellFiles:
    """The files of one cell: its run directory, and what the sweep adds to it."""

    cell: Cell
    run: RunDirectory

    @property
    def result(self) -> Path:
        """Its line of results.jsonl."""
        return self.run.path / "result.json"

    @property
    def log(self) -> Path:
        """Standard output and error of its processes."""
        return self.run.path / "output.log"

    def lock(self) -> IO[Any] | None:
        """Makes the run directory and locks the cell; returns the open file, or None if another process holds it."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        file = (self.run.path / ".cell.lock").open("a", encoding="ascii")
        try:
            lock(file.fileno())  # granted on a file system without locks
        except BlockingIOError:
            file.close()
            return None
        return file

    def read_result(self) -> dict[str, Any] | None:
        """Returns its result, or None without one.

        Raises:
            ConfigError: The file is damaged.
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
        """Returns whether it has a final result; a failed cell is run again."""
        result = self.read_result()
        return result is not None and result["state"] != "failed"

    def last_step(self) -> int:
        """Returns the last step in the record of the run; 0 without any."""
        return int(last_values(self.run.metrics, ("step",), []).get("step", 0))


class SweepDirectory:
    """The output folder of a sweep; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study, self.about, self.results = path / "sweep.yaml", path / "study.json", path / "results.jsonl"

    def files(self, cell: Cell) -> CellFiles:
        """Returns the files of a cell."""
        return CellFiles(cell, RunDirectory(self.path / "cells" / cell.name))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and locks the files that all cells share, until the end of the block."""
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
        """Writes sweep.yaml; the caller holds the lock."""
        write_atomically(self.study, study.to_yaml())

    def stale(self, cells: Sequence[Cell]) -> list[str]:
        """Returns the names of cells that have a result here and are not in this grid."""
        found = {file.parent.name for file in self.path.glob("cells/*/result.json")}
        return sorted(found - {cell.name for cell in cells})

    def collect(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Writes results.jsonl from the results of the cells, and returns them in the order of the grid."""
        with self.locked():
            results = [result for cell in cells if (result := self.files(cell).read_result()) is not None]
            write_atomically(self.results, "".join(json.dumps(result) + "\n" for result in results))
            if len(results) == len(cells):
                note_end(self.about)
        return results


def changes_of(files: CellFiles) -> list[Problem]:
    """Returns the fields in which the configuration of a cell differs from the stored one of its run."""
    path, name = files.run.config, files.cell.name
    if not path.exists():
        return []
    try:
        stored = flat(read_stored(path).to_dict())
    except ConfigError as error:
        return [Problem(f"cell {name}", str(path), problem.remedy) for problem in error.problems]
    now = flat(files.cell.config.to_dict())
    remedy = f"the cell ran with {{}}; name another --output, or remove {files.run.path} to run it anew"
    return [
        Problem(f"cell {name}: {field}", now.get(field), remedy.format(stored.get(field)))
        for field in {**stored, **now}
        if stored.get(field) != now.get(field) and not is_in(_MAY_DIFFER, field)
    ]


def num_shallow(num_blocks: int) -> int:
    """Returns how many blocks are called shallow: the first quarter, at least one."""
    return max(1, num_blocks // 4)


def events_of(run: RunDirectory) -> list[dict[str, Any]]:
    """Returns the events of a run; none if the log is damaged: the run is then continued, which reports it."""
    try:
        return read_record(run.events, "event")
    except ValueError:
        return []


def ending_of(run: RunDirectory, after: int = 0) -> Record:
    """Returns the event that the last start of a run ended with, after that many events; {} if it has none."""
    last = last_start_or_end(events_of(run)[after:])
    return {} if last.get("event") == "start" else last


def state_of(ending: Record) -> Literal["done", "diverged"] | None:
    """Returns the state of a cell whose run ended with this event, or None if the run is not over."""
    if ending.get("event") == "finished":
        return "done"
    if ending.get("event") == "stopped" and ending.get("exit_code") in _DIVERGED:
        return "diverged"
    return None


def result_of(files: CellFiles, state: State, ending: Record, error: str | None, commit: str | None) -> dict[str, Any]:
    """Returns the result of a cell from the record of its run; docs/studies/README.md lists its fields.

    `error` is what went wrong in a failed cell, `commit` that of this start, for a run that has not recorded any.
    """
    try:
        records = read_record(files.run.metrics, "step")
        return _result(files, state, ending, error, commit, records)
    except (ValueError, TypeError, LookupError, AttributeError) as fault:
        reason = str(fault) if str(files.run.metrics) in str(fault) else f"{files.run.metrics}: {fault!r}"
        return _result(files, "failed", {}, f"the record cannot be read: {reason}", commit, [])


def _result(
    files: CellFiles, state: State, ending: Record, error: str | None, commit: str | None, records: Sequence[Record]
) -> dict[str, Any]:
    cell, train = files.cell, files.cell.config.train
    last_step = max((record["step"] for record in records), default=0)
    steps = int(ending.get("step") or last_step) if state == "diverged" else last_step
    losses = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    starts = [event for event in events_of(files.run) if event["event"] == "start"]
    commits = dict.fromkeys(event["commit"] for event in starts if isinstance(event.get("commit"), str))
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
    gradients, activations = _last(records, "gradients") or {}, _last(records, "activations") or {}
    shallow = value_at(gradients, "layers.gradient_variance") or [None]
    shallow = shallow[: num_shallow(len(shallow))]
    scores = _last(records, "spike_scores") or {}
    measured = {
        "gradient_variance_embedding": value_at(gradients, "kinds.embedding.gradient_variance"),
        "gradient_variance_shallow": None if None in shallow else math.fsum(shallow) / len(shallow),
        "residual_variance": (activations.get("residual_variance") or [None])[-1],
        "largest_logit": _largest(records, "activations.max_logit"),
        "largest_qk_singular_value": _largest(records, "gradients.layers.qk_spectral_norm"),
        "spikes": round(scores["loss_olmo_core"] * min(last_step, _SPIKE_HORIZON)) if scores else None,
    }
    result |= {name: value for name, value in measured.items() if value is not None}
    result |= {
        "diverged_at": steps if state == "diverged" else None,
        "seconds": round(_seconds(records), 3),
        "tokens": steps * train.global_batch_size * train.sequence_length,
        "error": error,
        "commit": ", ".join(commits) or commit,
    }
    return {name: finite_or_none(value) for name, value in result.items()}


def _last(records: Sequence[Record], name: str) -> Any:
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)


def _largest(records: Sequence[Record], keys: str) -> float | None:
    """Returns the largest of all recorded numbers, or of their lists over blocks; None if there are none."""
    found = [value_at(record, keys) for record in records]
    values = [value for item in found for value in (item if isinstance(item, list) else [item])]
    return max((float(value) for value in values if value is not None), default=None)


def _mean_of_last_tenth(losses: Sequence[tuple[int, float]], steps: int) -> float | None:
    if not losses:
        return None
    first = steps - math.ceil(steps / 10) + 1
    values = [loss for step, loss in losses if step >= first] or [losses[-1][1]]
    return math.fsum(values) / len(values)


def _seconds(records: Sequence[Record]) -> float:
    """Adds up the clocks of all starts: each begins at 0 and rises."""
    clocks = [float(record["seconds"]) for record in records]
    return sum(clock for clock, later in zip(clocks, [*clocks, -1.0][1:], strict=True) if later < clock)


def write_result(files: CellFiles, result: Record, keep_checkpoints: bool) -> None:
    """Removes checkpoints and then writes the result of a cell, whose lock the caller holds.

    If the sweep is killed in between, the next one makes the result from the record of the run. The checkpoints of a
    failed cell always stay: it continues from them.
    """
    folder = files.run.checkpoints
    # A link may lead to checkpoints of other runs.
    if result["state"] != "failed" and not keep_checkpoints and folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    write_atomically(files.result, json.dumps(result, indent=1) + "\n")
