"""What a start is about, found out before a process group exists: configuration, data, and where the run goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.inspection import good_step
from mlra_scale.checkpoint.manifest import read_complete_manifest
from mlra_scale.checkpoint.retention import checkpoint_name
from mlra_scale.config import BatchPlan, Config, ConfigError, Named, Problem, batch_plan, validate
from mlra_scale.data import Mix, check_data, identify_data
from mlra_scale.training.candidates import Choice, Rejected, choose
from mlra_scale.training.history import History
from mlra_scale.training.launch import check_device, check_launcher, resolve_device
from mlra_scale.training.progress import Progress
from mlra_scale.training.resume import (
    CHANGE_WHAT_IS_USUAL,
    Change,
    Comparison,
    compare,
    compare_model,
    flat,
    read_stored,
)
from mlra_scale.training.resumed_data import DataHistory, compare_data
from mlra_scale.training.rollbacks import read_rollbacks
from mlra_scale.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        config: The configuration as it was given.
        named: Which of its fields were named, and where.
        run: The run directory; None where it was not named.
        resume: The value of --resume.
        world_size: Number of ranks.
    """

    config: Config
    named: Named
    run: RunDirectory | None
    resume: str
    world_size: int


@dataclass(frozen=True)
class Start:
    """What a start does.

    Attributes:
        config: The configuration to go on with.
        plan: Its batch plan.
        run: The run directory.
        choice: What it goes on from.
        kind: `fresh`; `training` (the run of the checkpoint goes on); or `weights` (a new run begins with them).
        progress: The counters to go on with.
        mixes: The history of mixes of data sets, the present one included; empty: there is none yet.
        changes: What differs from the run so far.
        history: What the run changed so far, these changes included.
        rollbacks: Of the guard, the oldest first, as the run directory has them.
        is_good_step_lost: Whether the checkpoint that the guard would go back to is not there, or not complete.
    """

    config: Config
    plan: BatchPlan
    run: RunDirectory
    choice: Choice
    kind: Literal["fresh", "training", "weights"] = "fresh"
    progress: Progress = field(default_factory=Progress)
    mixes: tuple[Mix, ...] = ()
    changes: tuple[Change, ...] = ()
    history: History = field(default_factory=History)
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    is_good_step_lost: bool = False

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the checkpoint; None for a fresh start."""
        return self.choice.checkpoint

    @property
    def goes_on_in_place(self) -> bool:
        """Whether the run in the run directory goes on; else it is a new one, or a branch of another one."""
        return self.kind == "training" and self.checkpoint is not None and self.run.is_own(self.checkpoint)

    @property
    def changes_what_is_usual(self) -> bool:
        """Whether loss and gradient norm of the steps before say nothing about those to come, because of a change."""
        return any(change.field in CHANGE_WHAT_IS_USUAL for change in self.changes)

    @property
    def is_done(self) -> bool:
        """Whether the run has done its steps already."""
        return self.progress.step >= self.config.train.steps

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Checkpoints that would have come first."""
        return self.choice.rejected


def prepare(asked: Asked, excluded: Mapping[Path, str] | None = None) -> Start:
    """Checks configuration, device, data, run directory and checkpoint, without writing anything.

    Args:
        asked: What the command line asks for.
        excluded: Checkpoints that were found to be bad, with the reason.

    Returns:
        What the start does.

    Raises:
        ConfigError: With everything that is wrong.
    """
    problems = check_launcher(os.environ)
    choice, store = Choice(None), None
    try:
        if asked.run is None:
            remedy = "is required: name a directory for what the run leaves behind"
            raise ConfigError([Problem("--run-dir", None, remedy)])
        choice = choose(asked.run, asked.resume, excluded)
        store = None if choice.checkpoint is None else Store.open(choice.checkpoint)
    except ConfigError as error:
        problems += error.problems
    except CheckpointError as error:
        problems.append(Problem("--resume", asked.resume, str(error)))
    compared, named = _compared(asked, store)
    config = compared.config
    problems += compared.problems
    try:
        validate(config, asked.world_size, device=resolve_device(config))
    except ConfigError as error:
        problems += error.problems
    problems += check_device(config)
    found = check_data(config)
    problems += found
    changes, progress, history = list(compared.changes), Progress(), History()
    mixes: tuple[Mix, ...] = ()
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    is_good_step_lost = False
    if store is not None and store.kind == "training":
        progress, data, history = _stored_place(store)
        if not found:
            about_data = compare_data(identify_data(config), data, progress.consumed_samples, named)
            problems += about_data.problems
            changes += about_data.changes
            mixes = about_data.mixes
        if asked.run is not None and asked.run.is_own(store.folder):
            try:
                rollbacks = read_rollbacks(asked.run.guard)
            except ValueError as error:
                problems.append(Problem("--run-dir", str(asked.run.guard), str(error)))
            is_good_step_lost = _is_good_step_lost(asked.run, store)
        if (was := store.manifest.layout["world_size"]) != asked.world_size:
            changes.append(Change("number of ranks", was, asked.world_size))
    if problems:
        raise ConfigError(problems)
    assert asked.run is not None
    kind: Literal["fresh", "training", "weights"] = "fresh"
    if store is not None:
        kind = "training" if store.kind == "training" else "weights"
    if store is not None and kind == "weights":
        history = History(begun_from={"checkpoint": store.manifest.save_id, **(store.state.get("origin") or {})})
    history = history.followed_by(changes, progress.step)
    return Start(
        config,
        batch_plan(config, asked.world_size),
        asked.run,
        choice,
        kind,
        progress,
        mixes,
        tuple(changes),
        history,
        rollbacks,
        is_good_step_lost,
    )


def _compared(asked: Asked, store: Store | None) -> tuple[Comparison, Named]:
    """Compares the configuration with that of the checkpoint and, where the run has none of its own, with the run's.

    Returns:
        The comparison, and the fields that count as named.
    """
    config, named, run = asked.config, asked.named, asked.run
    begun = Comparison(config)
    if (
        run is not None
        and asked.resume != "none"
        and run.holds_a_run()
        and (store is None or not run.is_own(store.folder))
    ):
        # Killed before its first checkpoint: the same run may begin anew here, another one may not.
        try:
            own = read_stored(run.config.read_text(encoding="utf-8"), str(run.path))
        except OSError as error:
            remedy = f"its config.yaml cannot be read: {error.strerror}"
            return Comparison(config, [], [Problem("--resume", str(run.path), remedy)]), named
        except ConfigError as error:
            return Comparison(config, [], error.problems), named
        begun = compare(config, named, own)
        if store is not None and store.config is not None:
            # What the branch was begun with stays named, though this start may not name it again.
            was, now = flat(store.config.to_dict()), flat(own.to_dict())
            branched = {name for name in now if now[name] != was[name]}
            named = Named(named.on_command_line | branched, named.in_file)
    if store is None or begun.problems:
        return begun, named
    if store.config is None:
        return replace(begun, problems=compare_model(begun.config, store.model)), named
    return compare(begun.config, named, store.config), named


def _is_good_step_lost(run: RunDirectory, store: Store) -> bool:
    """Returns whether the checkpoint that the guard would go back to is missing: found out now, another one can do."""
    if (step := good_step(store.state)) is None:
        return False
    try:
        read_complete_manifest(run.checkpoints / checkpoint_name(step))
    except CheckpointError:
        return True
    return False


def _stored_place(store: Store) -> tuple[Progress, DataHistory, History]:
    """Returns how far the run of a checkpoint has come, in steps and in its data, and what it changed on the way."""
    try:
        progress = Progress(**store.state["progress"])
        return progress, DataHistory.from_dict(store.state["data"]), History.of(store.state, progress.step)
    except (KeyError, TypeError, ValueError) as error:
        remedy = f"its state.json is not one of this program ({type(error).__name__}: {error}); use another checkpoint"
        raise ConfigError([Problem("--resume", str(store.folder), remedy)]) from error
