"""Carrying out what the guard decides: going back to a checkpoint, for good, and skipping data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlra_scale.stability.guard import Action, Guard
from mlra_scale.training.agreement import on_rank_0
from mlra_scale.training.checkpoints import Checkpoints
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import FiniteCheck, TrainingStopped
from mlra_scale.training.overseer import Overseer
from mlra_scale.training.progress import Progress
from mlra_scale.training.rollbacks import write_rollbacks

if TYPE_CHECKING:
    from mlra_scale.parallel import StepResult, Topology, UpdateProposal
    from mlra_scale.training.report import Report


def approval(
    guard: Guard, is_finite: Callable[[UpdateProposal], bool], measure: Callable[[UpdateProposal], None]
) -> Callable[[UpdateProposal], bool]:
    """Returns what decides before every update whether it may be applied, and measures it."""

    def approve(proposal: UpdateProposal) -> bool:
        measure(proposal)
        # Both are asked: the guard has to know of every update.
        is_usual = guard.approve(proposal.loss, proposal.gradient_norm)
        return is_finite(proposal) and is_usual

    return approve


def decide(guard: Guard, finite: FiniteCheck, step: int, place: int, result: StepResult) -> list[Action]:
    """Returns what the guard decides after a step.

    Args:
        guard: It.
        finite: Has checked the step, and counts overflows.
        step: The step.
        place: Index of its first sample.
        result: What the engine reported.
    """
    if result.overflow:
        return guard.overflowed(step, place, finite.too_many_overflows)
    return guard.judge(step, place, result.loss, result.gradient_norm)


def carry_out(
    actions: Sequence[Action],
    guard: Guard,
    checkpoints: Checkpoints,
    report: Report,
    path: Path,
    topology: Topology,
    overseer: Overseer,
) -> Progress | None:
    """Does what the guard has decided after a step; collective.

    Args:
        actions: Its decisions.
        guard: It.
        checkpoints: Of the run.
        report: Tells of it.
        path: guard.json.
        topology: The mesh.
        overseer: Told that going back is progress too.

    Returns:
        The counters to go on with if the run went back; else None.

    Raises:
        TrainingStopped: The guard gives up, or the checkpoint to go back to cannot be read; on all ranks.
    """
    if not actions:
        return None
    last = actions[-1]
    report.guarded(actions, guard.rate_factor(last.step + 1), guard.lowered_until(last.step + 1))
    if last.kind == "give_up":
        raise given_up(last, guard)
    if last.kind != "rollback":
        return None
    return go_back(last, guard, checkpoints, report, path, topology, overseer)


def go_back(
    action: Action,
    guard: Guard,
    checkpoints: Checkpoints,
    report: Report,
    path: Path,
    topology: Topology,
    overseer: Overseer,
) -> Progress:
    """Takes a run back to a checkpoint, so that the data of the trouble are not read again; collective.

    In this order: killed before the file is written, the run goes on from that checkpoint, meets the same trouble and
    goes back again; killed after it, it goes on without those data, and no checkpoint of what was undone is left that
    would count as a newer one.

    Args:
        action: The guard's rollback.
        guard: It goes on from the checkpoint too.
        checkpoints: Of the run.
        report: Tells of it.
        path: guard.json.
        topology: The mesh.
        overseer: Hears of every part that takes time: waiting for a save, loading, telling wandb.

    Returns:
        The counters to go on with.

    Raises:
        TrainingStopped: The checkpoint cannot be read; on all ranks.
    """
    assert action.to_step is not None
    beat = partial(overseer.beat, "going back", action.to_step)
    beat()
    progress = checkpoints.go_back_to(action.to_step, beat)
    guard.went_back(action)

    def write() -> None:
        checkpoints.remove_after(progress.step)
        write_rollbacks(path, guard.rollbacks)
        following = progress.step + 1
        factor, until = guard.rate_factor(following), guard.lowered_until(following)
        report.went_back(action, guard.num_rollbacks, progress, factor, until)

    on_rank_0(write, topology, progress.step, ExitCode.CHECKPOINT_FAILED)
    return progress


def given_up(action: Action, guard: Guard) -> TrainingStopped:
    """Returns what ends a run that the guard cannot keep stable, with its report; on all ranks."""
    returns = [f"from step {item['step']} back to step {item['to_step']}: {item['reason']}" for item in guard.rollbacks]
    message = (
        f"step {action.step}: the guard gives up: {action.reason}. Lower optim.lr, lengthen optim.warmup_steps, or "
        "look in rolled_back.jsonl and in the guard's events for what the episodes have in common. "
        f"What was tried: {'; '.join(returns) or 'updates were left out, and the learning rate was lowered'}"
    )
    return TrainingStopped(message, {"step": action.step}, ExitCode.UNSTABLE)
