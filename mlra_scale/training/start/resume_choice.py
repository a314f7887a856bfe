"""Where a start resumes: which checkpoint, and whether its data are those that the run has read so far.

The checkpoint is the one that was named or, for `--resume auto`, the first good one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.retention import checkpoint_folders, complete_checkpoints, latest
from mlra_scale.checkpoint.state_contents import STATE
from mlra_scale.config import ConfigError, Named, Problem
from mlra_scale.data.mix import DataIdentity, Mix, continued
from mlra_scale.training.resume import RESETS_GUARD_STATISTICS, Change, History
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.schedule import Progress


@dataclass(frozen=True)
class DataHistory:
    """The data of a run as its checkpoint stores them: mixes of data sets, and two fingerprints where there are any."""

    mixes: tuple[Mix, ...]
    validation: str | None
    tokenizer: str | None

    @classmethod
    def of(cls, identity: DataIdentity, mixes: Sequence[Mix]) -> DataHistory:
        """Returns the history of a run that now reads the data of `identity`."""
        return cls(tuple(mixes), identity.validation, identity.tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        mixes = [mix.to_dict() for mix in self.mixes]
        return {"mixes": mixes, "validation": self.validation, "tokenizer": self.tokenizer}

    def renamed(self, fingerprints: Mapping[str, str]) -> DataHistory:
        """Returns the history with new fingerprints for the same data sets, by those so far."""
        validation = None if self.validation is None else fingerprints.get(self.validation, self.validation)
        return replace(self, mixes=tuple(mix.renamed(fingerprints) for mix in self.mixes), validation=validation)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataHistory:
        """Reverses `to_dict`.

        Raises:
            ValueError: Something is missing or garbled.
        """
        try:
            mixes = tuple(map(Mix.from_dict, values["mixes"]))
            validation, tokenizer = values["validation"], values["tokenizer"]
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a history of data: {error!r}") from error
        starts = [mix.from_sample for mix in mixes]
        is_in_order = starts[:1] == [0] and all(one < next_one for one, next_one in pairwise(starts))
        if not is_in_order or not all(isinstance(name, str | None) for name in (validation, tokenizer)):
            raise ValueError(f"not a history of data: mixes from samples {starts}, {validation!r}, {tokenizer!r}")
        if not all(isfinite(weight) for mix in mixes for weight in mix.weights):
            raise ValueError("not a history of data: a weight is not finite")
        return cls(mixes, validation, tokenizer)


@dataclass(frozen=True)
class DataComparison:
    """The history of mixes to continue with, and differences from the run so far: accepted ones and refused ones."""

    mixes: tuple[Mix, ...]
    changes: list[Change] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def compare_data(identity: DataIdentity, stored: DataHistory, consumed_samples: int, named: Named) -> DataComparison:
    """Compares data by their fingerprints, wherever they are stored.

    Another mix of data sets takes effect with the next sample if `data.blend` is named on the command line.
    """
    changes, problems, converted = [], [], stored.renamed(identity.earlier)
    if converted != stored:
        changes.append(Change("form of the data's fingerprints", 1, 2))
        stored = converted
    if None not in (identity.tokenizer, stored.tokenizer) and identity.tokenizer != stored.tokenizer:
        remedy = f"the run to be resumed was trained with tokenizer {_short(stored.tokenizer)}; the same token would "
        remedy += "mean another text: use data made with that one, or start a new run"
        problems.append(Problem("data (tokenizer)", _short(identity.tokenizer), remedy))
    problems += _validation_problems(identity.validation, stored.validation)
    current, last = replace(identity.mix, from_sample=consumed_samples), stored.mixes[-1]
    if last.reads_like(current):
        return DataComparison(stored.mixes, changes, problems)
    if "data.blend" not in named.on_command_line:
        return DataComparison(stored.mixes, changes, problems + _mix_problems(identity, last))
    problems += _replaced_problems(identity.mix, last)
    changes.append(Change("data.blend", _blend(last), _blend(current)))
    return DataComparison(continued(stored.mixes, current), changes, problems)


def _validation_problems(now: str | None, was: str | None) -> list[Problem]:
    if now == was:
        return []
    if was is None:
        remedy = "the run to be resumed has no separate validation data; leave them out, or start a new run"
    elif now is None:
        remedy = f"the run to be resumed has validation data of fingerprint {_short(was)}; name them"
    else:
        remedy = f"not the data of the run to be resumed, whose fingerprint is {_short(was)}; they may have moved, but "
        remedy += "must be the same, or start a new run"
    return [Problem("data.validation_path", f"fingerprint {_short(now)}", remedy)]


def _mix_problems(identity: DataIdentity, last: Mix) -> list[Problem]:
    """Returns the differences of a mix that was not changed on purpose, field by field."""
    blend = ", ".join(f"{name}: {weight:g}" for name, weight in _blend(identity.mix).items())
    remedy = f"to continue with other data from here on, name them on the command line: 'data.blend={{{blend}}}'"
    remedy += "" if identity.is_blend else " data.path=null"
    now, was = identity.mix.fingerprints, last.fingerprints
    fields = list(identity.fingerprints)[: len(now)]
    problems = []
    for index in range(max(len(now), len(was))):
        if index >= len(was):
            fault = f"the run to be resumed has {len(was)} data set(s)"
            problems.append(Problem(fields[index], f"fingerprint {_short(now[index])}", f"{fault}; {remedy}"))
        elif index >= len(now):
            fault = f"the run to be resumed reads {last.names[index]} (fingerprint {_short(was[index])}) too"
            problems.append(Problem(f"data set {index + 1}", None, f"{fault}; {remedy}"))
        elif now[index] != was[index]:
            fault = f"not the data of the run to be resumed, whose fingerprint is {_short(was[index])} "
            fault += f"({last.names[index]}); they may have moved, but must be the same"
            problems.append(Problem(fields[index], f"fingerprint {_short(now[index])}", f"{fault}; {remedy}"))
    if not problems:
        fault = f"the run to be resumed has the weights {list(last.weights)}, in this order"
        problems.append(Problem("data.blend", list(identity.mix.weights), f"{fault}; {remedy}"))
    return problems


def _replaced_problems(now: Mix, was: Mix) -> list[Problem]:
    """Returns data sets that have the same path as before but other content, which naming the blend cannot mean."""
    before = dict(zip(was.names, was.fingerprints, strict=True))
    return [
        Problem(
            f"data.blend.{name}",
            f"fingerprint {_short(fingerprint)}",
            f"the data here were replaced: the run to be resumed read data of fingerprint {_short(before[name])} from "
            "this path; put them back, or give the new ones a path of their own",
        )
        for name, fingerprint in zip(now.names, now.fingerprints, strict=True)
        if before.get(name, fingerprint) != fingerprint
    ]


def _blend(mix: Mix) -> dict[str, float]:
    return dict(zip(mix.names, mix.weights, strict=True))


def _short(fingerprint: str | None) -> str | None:
    return None if fingerprint is None else fingerprint[:16]


@dataclass(frozen=True)
class Rejected:
    """A checkpoint (or the file that should name one) that takes precedence but cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts: at step 0, at a checkpoint of its own or of another run, or at step 0 with given weights.

    Attributes:
        checkpoint: The folder of the checkpoint; None for a fresh start.
        rejected: Checkpoints that were passed over.
        kind: `fresh`; `training` (the run of the checkpoint continues); or `weights` (a new run begins with them).
        is_in_place: Whether the run in the run directory continues; else it is a new one, or a branch of another one.
        progress: The counters to continue with.
        mixes: The mixes of data sets so far, the present one included; empty: the run has none yet.
        changes: Differences from the run so far.
        history: All changes of the run, these included.
        rollbacks: Of the guard, the oldest first.
        is_good_step_lost: Whether the checkpoint for the guard's next rollback is missing or cannot be opened.
        left_out: Measurements that a stop left out after the step of the checkpoint; they are made first.
        measured: What was measured before that stop and is in the checkpoint, for the one that is saved in its place.
        notices: Lines about the checkpoint's format and about moments that begin anew.
        adam_begun_at: After how many updates of the run AdamW of a parameter began, where that was not with the run.
    """

    checkpoint: Path | None = None
    rejected: tuple[Rejected, ...] = ()
    kind: Literal["fresh", "training", "weights"] = "fresh"
    is_in_place: bool = False
    progress: Progress = field(default_factory=Progress)
    mixes: tuple[Mix, ...] = ()
    changes: tuple[Change, ...] = ()
    history: History = field(default_factory=History)
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    is_good_step_lost: bool = False
    left_out: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    adam_begun_at: Mapping[str, int] = field(default_factory=dict)

    @property
    def resets_guard_statistics(self) -> bool:
        """Whether a change makes the losses and gradient norms so far meaningless for those to come."""
        return any(change.field in RESETS_GUARD_STATISTICS for change in self.changes)

    def carries_on(self, field: str) -> bool:
        """Whether the run in the run directory continues and has used the whole section of a field as it is now."""
        section = field.partition(".")[0]
        return self.is_in_place and all(change.field.partition(".")[0] != section for change in self.changes)


def choose_checkpoint(run: RunDirectory, resume: str, excluded: Mapping[Path, str] | None = None) -> ResumePoint:
    """Finds the checkpoint of a resume point, without writing; checksums of weights are not compared here.

    Args:
        run: The run directory.
        resume: `none`; `auto` (the checkpoint that `latest` names, or the newest good one where that is bad, or a fresh
            start where there is none); or the path of a checkpoint, of a checkpoints folder or of a run directory. The
            path from which the run in the directory began means `auto`, since a queue repeats the same command.
        excluded: Checkpoints that were found to be bad, with the reason.

    Raises:
        ConfigError: The run directory cannot be used, or there are checkpoints and none of them is good.
    """
    if run.path.exists() and not run.path.is_dir():
        raise _refused(run, "is a file; name a directory")
    nearest_existing = next(path for path in (run.path, *run.path.resolve().parents) if path.exists())
    if not os.access(nearest_existing, os.W_OK | os.X_OK):
        raise _refused(run, "cannot be written; name another directory")
    if resume == "auto":
        return _newest_good(run, excluded or {})
    if resume != "none":
        return _named(run, resume, excluded or {})
    if run.holds_a_run():
        raise _refused(run, "holds another run; continue it with --resume auto, or name another directory")
    return ResumePoint()


def _newest_good(run: RunDirectory, excluded: Mapping[Path, str]) -> ResumePoint:
    rejected = []
    pointer = latest(run.checkpoints)
    if pointer is None and checkpoint_folders(run.checkpoints):
        rejected.append(Rejected(run.checkpoints / "latest", "is missing"))
    for path in _in_order(run.checkpoints, pointer):
        reason = _fault(path, excluded)
        if reason is None:
            return ResumePoint(path, tuple(rejected))
        rejected.append(Rejected(path, reason))
    if rejected:
        reasons = "; ".join(f"{item.path.name}: {item.reason}" for item in rejected)
        remedy = f"the run has checkpoints, and none of them can be used ({reasons}); mend or move {run.checkpoints}"
        raise ConfigError([Problem("--resume", "auto", remedy + " if the run is to begin anew")])
    origin = _origin(run)
    # Stopped before its first checkpoint, a run that began with weights of another one begins with them again.
    if origin is not None and (reason := _fault(origin, excluded)) is not None:
        remedy = f"the run began from {origin}, which is no longer good: {reason}"
        raise ConfigError([Problem("--resume", "auto", remedy)])
    return ResumePoint(origin)


def _in_order(checkpoints: Path, pointer: Path | None) -> list[Path]:
    """Returns the candidates of `--resume auto`: what `latest` names, the earlier ones, then the later ones.

    Later ones are those of an abandoned branch, and one whose save was cut off before `latest` moved. Without a pointer
    complete checkpoints come first, the last one saved before the others; the incomplete ones only give their reasons.
    """
    folders = checkpoint_folders(checkpoints)[::-1]
    if pointer is None:
        complete = complete_checkpoints(checkpoints)[::-1]
        return complete + [path for path in folders if path not in complete]
    others = [path for path in folders if path != pointer]
    return [pointer, *sorted(others, key=lambda path: path.name > pointer.name)]


def _named(run: RunDirectory, resume: str, excluded: Mapping[Path, str]) -> ResumePoint:
    given = Path(resume).resolve()
    if _began_from(run, given):
        return _newest_good(run, excluded)
    candidates = [path for path in (given, latest(given), latest(given / "checkpoints")) if path is not None]
    path = next((path for path in candidates if (path / "manifest.json").is_file()), None)
    path = path or next((path for path in candidates if path.name.startswith("step-")), None)
    if path is None:
        remedy = "is no checkpoint, and no run directory with one; give auto, none or a path"
        raise ConfigError([Problem("--resume", resume, remedy)])
    if (reason := _fault(path, excluded)) is not None:
        raise ConfigError([Problem("--resume", resume, reason)])
    if run.holds_a_run() and not run.is_own(path):
        fault = f"holds a run, and {path} is none of its checkpoints; name a new directory for the branch, or continue "
        raise _refused(run, fault + "the run that is here with --resume auto")
    return ResumePoint(path)


def _began_from(run: RunDirectory, given: Path) -> bool:
    """Returns whether the run in the directory is a branch that was begun by naming this path."""
    origin = _origin(run)
    if origin is None or not run.holds_a_run():
        return False
    return given in (origin, origin.parent) or (given / "checkpoints").resolve() == origin.parent


def _origin(run: RunDirectory) -> Path | None:
    try:
        return run.origin()
    except ValueError as error:
        raise _refused(run, str(error)) from None


def _refused(run: RunDirectory, remedy: str) -> ConfigError:
    return ConfigError([Problem("--run-dir", str(run.path), remedy)])


def _fault(path: Path, excluded: Mapping[Path, str]) -> str | None:
    """Returns what is wrong with a checkpoint, according to its manifest, file sizes and small files."""
    if path in excluded:
        return excluded[path]
    try:
        store = Store.open(path)
        if store.kind == "training":
            read_progress(store)
    except CheckpointError as error:
        return str(error)
    return None


def read_progress(store: Store) -> tuple[Progress, DataHistory, History]:
    """Returns the counters, the data and the changes of the run that a checkpoint belongs to.

    Raises:
        CheckpointError: They are missing or garbled, or the state cannot be loaded into an engine.
    """
    try:
        for name in ("optimizer_step", "num_skipped"):
            if type(number := store.state["engine"][name]) is not int or number < 0:
                raise ValueError(f"engine has {name} {number!r}")
        _check_begun(store.state["engine"], store)
        if not isinstance(store.state["windows"], dict):
            raise ValueError(f"windows is {store.state['windows']!r}")
        progress = Progress(**store.state["progress"])
        return progress, DataHistory.from_dict(store.state["data"]), History.of(store.state, progress.step)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{store.folder / STATE} is not sound ({reason}); use another checkpoint") from error


def _check_begun(engine: Mapping[str, Any], store: Store) -> None:
    """Checks the counts of updates of single parameters (see checkpoint/other_optimizer.py)."""
    if not isinstance(begun := engine.get("adam_begun_at", {}), dict):
        raise ValueError(f"engine has adam_begun_at {str(begun)[:80]!r}")
    for name, at in begun.items():
        if name not in store.table or type(at) is not int or not 0 < at <= engine["optimizer_step"]:
            raise ValueError(f"engine has adam_begun_at {name[:80]!r} {at!r}")
