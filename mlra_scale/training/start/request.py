"""What a start is asked to do, and the run that this resolves to before a process group exists."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.inspection import good_step
from mlra_scale.checkpoint.other_optimizer import adam_begun_at, notice_of_change
from mlra_scale.checkpoint.retention import checkpoint_name
from mlra_scale.config import BatchPlan, Config, ConfigError, ExportConfig, Named, Problem, batch_plan
from mlra_scale.data import check_data, identify_data
from mlra_scale.data.data_sets import FoundData, find_data
from mlra_scale.evaluation.tasks import task_problems
from mlra_scale.model.update_rules import update_rules
from mlra_scale.model.validation import validate
from mlra_scale.planning.choice import FIELDS, LayoutChoice
from mlra_scale.publishing.hub import HubError, check_access
from mlra_scale.training.log.tensorboard_log import check_tensorboard
from mlra_scale.training.record import read_record
from mlra_scale.training.resume import (
    Change,
    ConfigComparison,
    History,
    compare,
    compare_model,
    flat,
    read_stored,
    with_watchers_of,
)
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start.device import (
    Devices,
    Launcher,
    check_device,
    check_launcher,
    devices_elsewhere,
    devices_here,
    resolve_device,
)
from mlra_scale.training.start.plan import resolve_layout
from mlra_scale.training.start.resume_choice import (
    ResumePoint,
    choose_checkpoint,
    compare_data,
    read_progress,
)

_MEASURED = ("validation_loss", "tasks", "harness")
"""Measurements in a checkpoint that the model card of an export shows."""


@dataclass(frozen=True)
class LaunchRequest:
    """What the command line asks for.

    Attributes:
        config: The configuration as given.
        named: Which of its fields were named, and where.
        run: The run directory; None where it was not named.
        resume: The value of --resume.
        world_size: Number of ranks.
        is_stored_config: Whether the configuration is that of the run directory, with the fields that were named.
        ranks_per_node: Number of ranks on each node; None: as the launcher of this process says.
    """

    config: Config
    named: Named
    run: RunDirectory | None
    resume: str
    world_size: int
    is_stored_config: bool = False
    ranks_per_node: int | None = None


@dataclass(frozen=True)
class ResolvedRun:
    """A run as a start will carry it out.

    Attributes:
        config: The configuration to continue with; `plan` is its batch plan.
        directory: The run directory.
        resume: Where the run starts.
        layout: How the planner chose the layout; None: there was nothing to choose.
        is_export_due: Whether this start ends with an export: where one is wanted, after steps, and where all steps
            are done and this checkpoint was not exported (and pushed) as the configuration says.
        found_data: The data sets as this process found them; not pickled, and so None in what another process sent.
    """

    config: Config
    plan: BatchPlan
    directory: RunDirectory
    resume: ResumePoint = field(default_factory=ResumePoint)
    layout: LayoutChoice | None = None
    is_export_due: bool = False
    found_data: FoundData | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found_data": None}

    @property
    def is_done(self) -> bool:
        """Whether the run has done all its steps before this start."""
        return _is_done(self.config, self.resume)


def resolve_run(
    request: LaunchRequest, excluded: Mapping[Path, str] | None = None, is_here: bool = True
) -> ResolvedRun:
    """Checks configuration, device, data, run directory and checkpoint, without writing anything.

    Args:
        request: What the command line asks for.
        excluded: Checkpoints that were found to be bad, with the reason.
        is_here: Whether this process is on the machine of a rank; else launcher and device are not checked.

    Raises:
        ConfigError: With everything that is wrong.
    """
    problems = check_launcher(os.environ) if is_here else []
    resume, store = ResumePoint(), None
    with _gathering(problems, request.resume):
        if request.run is None:
            remedy = "is required: name a directory for what the run leaves behind"
            raise ConfigError([Problem("--run-dir", None, remedy)])
        resume = choose_checkpoint(request.run, request.resume, excluded)
        store = None if resume.checkpoint is None else Store.open(resume.checkpoint)
    compared, named = _compare_configs(request, store)
    problems += compared.problems
    config, layout = compared.config, None
    with _gathering(problems):
        config, layout = resolve_layout(config, request.named, devices_of(request, config, is_here))
        validate(config, request.world_size, resolve_device(config))
    problems += check_device(config) if is_here else []
    has_packages = is_here or "MLRA_PYTHON" not in os.environ  # else the ranks run in a container with its own
    problems += check_tensorboard(config) if has_packages else []
    found = find_data(config)
    is_continued = store is not None and store.kind == "training"
    data_problems = check_data(config, is_continued, found)
    problems += data_problems
    # What is on this machine every rank checks, so that all end alike; rank 0 alone needs a hub, or its cache.
    is_main = not is_here or Launcher.of(os.environ).rank == 0
    has_tokenizer = bool(found.manifests) or config.data.tokenizer is not None
    late = task_problems(config, has_tokenizer, is_here and is_main, has_packages)
    if store is not None and not is_continued:
        origin = {"checkpoint": store.manifest.save_id, **(store.state.get("origin") or {})}
        changes, history = _changes(compared, config, store), History(begun_from=origin)
        notices = _lines(store.manifest.notice)
        resume = replace(resume, kind="weights", changes=tuple(changes), history=history, notices=notices)
    elif store is not None:
        changes = _changes(compared, config, store)
        with _gathering(problems, request.resume):
            resume = _continued(resume, request, store, changes, None if data_problems else (config, found, named))
    is_export_due = _is_export_due(config, request.run, resume, store)
    if is_export_due and request.run is not None:
        problems += _target_problems(config, request.run)
        late += _hub_problems(config) if is_main else []
    # A hub that is silent for now does not keep a run from the steps that are left.
    carried = [each for each in late if resume.carries_on(each.field) and not _is_done(config, resume)]
    resume = replace(resume, notices=(*resume.notices, *(f"the run continues without it: {each}" for each in carried)))
    problems += [each for each in late if each not in carried]
    if problems:
        raise ConfigError(problems)
    if store is not None and is_continued:
        rules = update_rules(config.model, config.optim)
        notices = (*resume.notices, *_lines(notice_of_change(store, rules)))
        resume = replace(resume, notices=notices, adam_begun_at=adam_begun_at(store, rules))
    assert request.run is not None
    plan = batch_plan(config, request.world_size)
    return ResolvedRun(config, plan, request.run, resume, layout, is_export_due, found)


def _is_export_due(config: Config, run: RunDirectory | None, resume: ResumePoint, store: Store | None) -> bool:
    if config.export.format is None:
        return False
    if run is None or store is None or not _is_done(config, resume) or not run.exported.is_dir():
        return True
    try:
        events = read_record(run.events, "event")
    except (ValueError, OSError):
        return True
    exports = [event for event in events if event["event"] == "exported"]
    wanted = exported_as(config.export, store.manifest.save_id)
    return not exports or any(exports[-1].get(key) != value for key, value in wanted.items())


def exported_as(wanted: ExportConfig, save_id: str) -> dict[str, Any]:
    """Returns what the event of an export records, by which a later start knows whether that export is wanted."""
    return {"checkpoint": save_id, "export": wanted.model_dump(mode="json")}


def _is_done(config: Config, resume: ResumePoint) -> bool:
    return resume.progress.step >= config.train.steps and not resume.left_out


def _target_problems(config: Config, run: RunDirectory) -> list[Problem]:
    """Finds now what would end in no export after the last step."""
    from mlra_scale.checkpoint.huggingface.exporting import check_target  # imports transformers

    try:
        check_target(run.exported, is_replacing=True)
    except CheckpointError as error:
        return [Problem("export.format", config.export.format, str(error))]
    return []


def _hub_problems(config: Config) -> list[Problem]:
    """Finds now what would end in no push after the last step."""
    wanted = config.export
    try:
        if wanted.repository is not None:
            check_access(wanted.repository, wanted.private)
    except HubError as error:
        return [Problem("export.repository", wanted.repository, str(error))]
    return []


def _continued(
    resume: ResumePoint,
    request: LaunchRequest,
    store: Store,
    changes: list[Change],
    data: tuple[Config, FoundData, Named] | None,
) -> ResumePoint:
    """Returns where the run of a checkpoint continues; `data` is None where the data cannot be compared."""
    problems: list[Problem] = []
    progress, stored_data, history = read_progress(store)
    if data is not None:
        config, found, named = data
        compared = compare_data(identify_data(config, found), stored_data, progress.consumed_samples, named)
        problems += compared.problems
        changes += compared.changes
        resume = replace(resume, mixes=compared.mixes)
    if request.run is not None and request.run.is_own(store.folder):
        rollbacks: tuple[Mapping[str, Any], ...] = ()
        try:
            rollbacks = request.run.read_rollbacks()
        except ValueError as error:
            problems.append(Problem("--run-dir", str(request.run.guard), str(error)))
        problems += _record_problems(request.run)
        left_out = store.state.get("left_out")
        resume = replace(
            resume,
            is_in_place=True,
            rollbacks=rollbacks,
            is_good_step_lost=_is_good_step_lost(request.run, store),
            left_out=tuple(map(str, left_out)) if isinstance(left_out, list) else (),
            measured={name: store.state[name] for name in _MEASURED if store.state.get(name) is not None},
        )
    if (was := store.manifest.layout["world_size"]) != request.world_size:
        changes.append(Change("number of ranks", was, request.world_size))
    if problems:
        raise ConfigError(problems)
    return replace(
        resume,
        kind="training",
        progress=progress,
        changes=tuple(changes),
        history=history.followed_by(changes, progress.step),
        notices=_lines(store.manifest.notice),
    )


def _lines(notice: str | None) -> tuple[str, ...]:
    return () if notice is None else (notice,)


@contextlib.contextmanager
def _gathering(problems: list[Problem], resume: str = "") -> Iterator[None]:
    """Adds what is wrong in the block to the problems instead of raising it."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems
    except CheckpointError as error:
        problems.append(Problem("--resume", resume, str(error)))


def devices_of(request: LaunchRequest, config: Config, is_here: bool) -> Devices:
    """Returns the devices of a start; those of another machine (not `is_here`) as far as the configuration says."""
    if not is_here:
        return devices_elsewhere(config, request.world_size, request.ranks_per_node)
    return devices_here(request.world_size, resolve_device(config), request.ranks_per_node)


def _compare_configs(request: LaunchRequest, store: Store | None) -> tuple[ConfigComparison, Named]:
    """Compares the configuration with the checkpoint's and the run directory's; returns what counts as named too."""
    config, named, run = request.config, request.named, request.run
    own, is_elsewhere = None, store is None or (run is not None and not run.is_own(store.folder))
    needs_own = is_elsewhere or request.is_stored_config
    if run is not None and request.resume != "none" and run.holds_a_run():
        try:
            own = read_stored(run.config)
            config = with_watchers_of(own, config, named)
        except ConfigError as error:
            if needs_own:
                return ConfigComparison(config, [], error.problems), named
    begun = ConfigComparison(config)
    if own is not None and needs_own:
        if is_elsewhere:
            # Killed before its first checkpoint, the same run may begin anew here, and no other one.
            begun = compare(config, named, own)
        if store is not None and store.config is not None:
            # Fields that an earlier start of this run, or of the branch, has named stay named.
            was, now = flat(store.config.to_dict()), flat(own.to_dict())
            changed = {name for name in now if now[name] != was[name]}
            named = Named(named.on_command_line | changed, named.in_file)
    if store is None or begun.problems:
        return begun, named
    if store.config is None:
        return replace(begun, problems=compare_model(begun.config, store.model)), named
    return compare(begun.config, named, store.config), named


def _changes(compared: ConfigComparison, config: Config, store: Store) -> list[Change]:
    """Returns the differences from the run so far, with the layout that was chosen for this start."""
    if config is compared.config or store.config is None:
        return list(compared.changes)
    was, now = flat(store.config.to_dict()), flat(config.to_dict())
    others = [change for change in compared.changes if change.field not in FIELDS]
    return [*others, *(Change(name, was[name], now[name]) for name in FIELDS if was[name] != now[name])]


def _record_problems(run: RunDirectory) -> list[Problem]:
    """Finds a damaged line of the record, which rank 0 alone will cut."""
    if Launcher.of(os.environ).rank != 0:
        return []
    try:
        read_record(run.metrics, "step")
    except (ValueError, OSError) as error:
        return [Problem("--run-dir", str(run.path), str(error))]
    return []


def _is_good_step_lost(run: RunDirectory, store: Store) -> bool:
    if (step := good_step(store.state)) is None:
        return False
    try:
        Store.open(run.checkpoints / checkpoint_name(step))
    except CheckpointError:
        return True
    return False
