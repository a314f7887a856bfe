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
from mlra_scale.data.parts import FoundParts, find_parts
from mlra_scale.planning.choice import FIELDS, LayoutChoice
from mlra_scale.training.candidates import Choice, Rejected, choose, stored_place
from mlra_scale.training.history import History
from mlra_scale.training.launch import check_device, check_launcher, devices_here, resolve_device
from mlra_scale.training.layout import Devices, devices_unseen, settled
from mlra_scale.training.progress import Progress
from mlra_scale.training.record import read_record
from mlra_scale.training.resume import (
    CHANGE_WHAT_IS_USUAL,
    Change,
    Comparison,
    compare,
    compare_model,
    flat,
    read_stored,
)
from mlra_scale.training.resumed_data import compare_data
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
        is_as_before: Whether the configuration is that of the run directory, with the fields that were named.
        ranks_per_node: Number of ranks on each node; None: as the launcher of this process says.
    """

    config: Config
    named: Named
    run: RunDirectory | None
    resume: str
    world_size: int
    is_as_before: bool = False
    ranks_per_node: int | None = None


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
        rollbacks: Of the guard, the oldest first, as the run directory has them.
        is_good_step_lost: Whether the checkpoint that the guard would go back to is not there, or not complete.
        notice: What there is to say of the checkpoint's format; None where it is the current one.
        left_out: What was due after the step of the checkpoint and was not measured, because a signal asked for a stop:
            it is measured first.
        history: What the run changed so far, these changes included.
        layout: How the planner has chosen the layout; None: everything was named.
        found: The data sets as this process has found them; None in what another process sent: it is not pickled.
    """

    config: Config
    plan: BatchPlan
    run: RunDirectory
    choice: Choice
    kind: Literal["fresh", "training", "weights"] = "fresh"
    progress: Progress = field(default_factory=Progress)
    mixes: tuple[Mix, ...] = ()
    changes: tuple[Change, ...] = ()
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    is_good_step_lost: bool = False
    notice: str | None = None
    left_out: tuple[str, ...] = ()
    history: History = field(default_factory=History)
    layout: LayoutChoice | None = None
    found: FoundParts | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": None}

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
        return self.progress.step >= self.config.train.steps and not self.left_out

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Checkpoints that would have come first."""
        return self.choice.rejected


def prepare(asked: Asked, excluded: Mapping[Path, str] | None = None, is_here: bool = True) -> Start:
    """Checks configuration, device, data, run directory and checkpoint, without writing anything.

    Args:
        asked: What the command line asks for.
        excluded: Checkpoints that were found to be bad, with the reason.
        is_here: Whether this process is a rank, or on its machine; else launcher and device are not looked at.

    Returns:
        What the start does.

    Raises:
        ConfigError: With everything that is wrong.
    """
    problems = check_launcher(os.environ) if is_here else []
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
    config, layout = compared.config, None
    problems += compared.problems
    try:
        config, layout = settled(config, asked.named, devices_of(asked, config, is_here))
        validate(config, asked.world_size, device=resolve_device(config))
    except ConfigError as error:
        problems += error.problems
    problems += check_device(config) if is_here else []
    found = find_parts(config)
    data_problems = check_data(config, store is not None and store.kind == "training", found)
    problems += data_problems
    changes, progress, history = _changes(compared, config, store), Progress(), History()
    mixes: tuple[Mix, ...] = ()
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    is_good_step_lost = False
    left_out: tuple[str, ...] = ()
    if store is not None and store.kind == "training":
        progress, data, history = stored_place(store)
        if not data_problems:
            about_data = compare_data(identify_data(config, found), data, progress.consumed_samples, named)
            problems += about_data.problems
            changes += about_data.changes
            mixes = about_data.mixes
        if asked.run is not None and asked.run.is_own(store.folder):
            try:
                rollbacks = read_rollbacks(asked.run.guard)
            except ValueError as error:
                problems.append(Problem("--run-dir", str(asked.run.guard), str(error)))
            is_good_step_lost = _is_good_step_lost(asked.run, store)
            stored = store.state.get("left_out")
            left_out = tuple(str(name) for name in stored) if isinstance(stored, list) else ()
            problems += _record_problems(asked.run)
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
    plan = batch_plan(config, asked.world_size)
    return Start(
        config,
        plan,
        asked.run,
        choice,
        kind,
        progress,
        mixes,
        tuple(changes),
        rollbacks,
        is_good_step_lost,
        None if store is None else store.manifest.notice,
        left_out,
        history.followed_by(changes, progress.step),
        layout,
        found,
    )


def devices_of(asked: Asked, config: Config, is_here: bool) -> Devices:
    """Returns the devices of a start, as far as this process can see them.

    Args:
        asked: What the command line asks for.
        config: Its configuration.
        is_here: Whether this machine is one of those that the start is for.
    """
    if not is_here:
        return devices_unseen(config, asked.world_size, asked.ranks_per_node)
    return devices_here(asked.world_size, resolve_device(config), asked.ranks_per_node)


def _compared(asked: Asked, store: Store | None) -> tuple[Comparison, Named]:
    """Compares the configuration with that of the checkpoint and, where the run has none of its own, with the run's.

    Returns:
        The comparison, and the fields that count as named.
    """
    config, named, run = asked.config, asked.named, asked.run
    begun = Comparison(config)
    is_continued = run is not None and asked.resume != "none" and run.holds_a_run()
    is_elsewhere = store is None or (run is not None and not run.is_own(store.folder))
    if run is not None and is_continued and (is_elsewhere or asked.is_as_before):
        try:
            own = read_stored(run.config)
        except ConfigError as error:
            return Comparison(config, [], error.problems), named
        if is_elsewhere:
            # Killed before its first checkpoint: the same run may begin anew here, another one may not.
            begun = compare(config, named, own)
        if store is not None and store.config is not None:
            # What the branch, or the run's newest start, was begun with stays named, though this start may not name it
            # again.
            was, now = flat(store.config.to_dict()), flat(own.to_dict())
            changed = {name for name in now if now[name] != was[name]}
            named = Named(named.on_command_line | changed, named.in_file)
    if store is None or begun.problems:
        return begun, named
    if store.config is None:
        return replace(begun, problems=compare_model(begun.config, store.model)), named
    return compare(begun.config, named, store.config), named


def _changes(compared: Comparison, config: Config, store: Store | None) -> list[Change]:
    """Returns what differs from the run so far, with the layout as it was chosen for this start."""
    changes = list(compared.changes)
    if config is compared.config or store is None or store.config is None:
        return changes
    was, now = flat(store.config.to_dict()), flat(config.to_dict())
    others = [change for change in changes if change.field not in FIELDS]
    return [*others, *(Change(name, was[name], now[name]) for name in FIELDS if was[name] != now[name])]


def _record_problems(run: RunDirectory) -> list[Problem]:
    """Finds a damaged line of the record, which rank 0 alone cuts, at the step where the run continues."""
    if os.environ.get("RANK", "0") != "0":
        return []
    try:
        read_record(run.metrics, "step")
    except (ValueError, OSError) as error:
        return [Problem("--run-dir", str(run.path), str(error))]
    return []


def _is_good_step_lost(run: RunDirectory, store: Store) -> bool:
    """Returns whether the checkpoint that the guard would go back to is missing: found out now, another one can do."""
    if (step := good_step(store.state)) is None:
        return False
    try:
        read_complete_manifest(run.checkpoints / checkpoint_name(step))
    except CheckpointError:
        return True
    return False
