"""The guard: decides what to do about an unstable run while it trains.

From the loss and the gradient norm of a step, which are the same on every rank, it decides in this order:
1. An update whose loss or gradient norm is far above those of the last steps is skipped (OLMo-core's skip-step).
2. If too many are skipped, the learning rate is lowered for some steps.
3. If that does not help, or if the loss has diverged, the run rolls back to the last checkpoint from before the
   trouble and skips the data on which it occurred (Chowdhery et al. 2022 (PaLM), sec. 5.1).
4. After a number of rollbacks it gives up.
A step that was computed wrong (corruption.py) is none of these: the run goes back and reads the same data again.
An overflow of fp16 gradients is none of these, since the loss scale is then lowered; a long row of them leads to 3.

This file decides; training/loop/session.py carries it out. All decisions are arithmetic over numbers that the ranks
share, so every layout decides alike, and the state is stored in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mlra_scale.config import GuardConfig
from mlra_scale.stability.spikes import Divergence, Window
from mlra_scale.stability.watcher import Step, Watcher

if TYPE_CHECKING:
    from mlra_scale.parallel import StepResult, UpdateProposal

_RISING_WINDOWS = 8
"""A loss that has been higher for more than this many windows has settled there, and is no longer rising."""


@dataclass(frozen=True)
class Action:
    """A decision of the guard after a step.

    Attributes:
        kind: skip: the update was skipped. lower_rate: the learning rate is lowered from the next step on. rollback:
            the run returns to a checkpoint. give_up: the run ends.
        step: The step.
        reason: In words, with the numbers.
        to_step: Of a rollback: step of the checkpoint.
        skipped: Of a rollback: the samples (first, one after the last) that are not read again; (0, 0): none.
        nodes: The ranks that computed wrong, where that is the reason, each with its node.
        ends_run: Whether the run ends after the rollback, because the computation stays wrong.
    """

    kind: Literal["skip", "lower_rate", "rollback", "give_up"]
    step: int
    reason: str
    to_step: int | None = None
    skipped: tuple[int, int] | None = None
    nodes: Mapping[int, str] = field(default_factory=dict)
    ends_run: bool = False


@dataclass(frozen=True)
class _Episode:
    """From the first bad update until `calm_steps` pass without one; `skips` are those since the last lowering."""

    first_step: int
    first_sample: int
    last_step: int
    skips: int = 0
    lowerings: int = 0


@dataclass(frozen=True)
class _Lowered:
    """A learning rate that is multiplied by `factor` at step `since` and is back on its schedule at `until`."""

    factor: float
    since: int
    until: int

    def holds_at(self, step: int) -> bool:
        return self.since <= step < self.until


class Guard(Watcher):
    """Watches a run. Where it is disabled it decides nothing, but samples skipped by earlier rollbacks stay skipped.

    Args:
        config: Thresholds.
        batch: Samples of a step, over all ranks.
        overflow_fault: Returns why a row of fp16 overflows is too long; None: it is not.

    Attributes:
        actions: Its decisions after the last step, in order; at most the last one is a rollback or the end.
        rollbacks: Those of the run so far, the oldest first.
        good_step: Step of the checkpoint for the next rollback, which must be kept; None: there is none.
    """

    name = "guard"

    def __init__(
        self, config: GuardConfig, batch: int, overflow_fault: Callable[[], str | None] = lambda: None
    ) -> None:
        self._config, self._batch, self._overflow_fault = config, batch, overflow_fault
        self.actions: list[Action] = []
        self.rollbacks: list[dict[str, Any]] = []
        self.good_step: int | None = None
        self._is_checked = config.replay_every > 0 or config.checksum_every > 0
        self._unconfirmed_step: int | None = None
        self._num_wrong, self._wrong_step = 0, 0
        self._clear_statistics()
        self._reset_at: int | None = None
        self._lowered: _Lowered | None = None
        self._fault: str | None = None

    def _clear_statistics(self) -> None:
        config = self._config
        self._losses, self._norms = Window(config.window), Window(config.window)
        self._divergence = None
        if config.divergence is not None:
            self._divergence = Divergence(config.divergence, config.divergence_steps)
        self._rising_steps = 0
        self._episode: _Episode | None = None
        self._overflow_sample: int | None = None

    @property
    def is_enabled(self) -> bool:
        return self._config.enabled

    def rate_factor(self, step: int) -> float:
        """Returns the factor on the scheduled learning rate of a step."""
        lowered = self._lowered
        if lowered is None or not lowered.holds_at(step):
            return 1.0
        share = (step - lowered.since) / (lowered.until - lowered.since)
        return lowered.factor + (1.0 - lowered.factor) * share

    def rate_after(self, step: int) -> dict[str, float | int | None]:
        """Returns the next step's `factor` on the rate, and `until`, the step at which the factor ends (or None)."""
        lowered = self._lowered
        until = lowered.until if lowered is not None and lowered.holds_at(step + 1) else None
        return {"factor": self.rate_factor(step + 1), "until": until}

    def first_sample(self, sample: int) -> int:
        """Returns where the next step reads: at `sample`, or after the samples that are skipped there."""
        skipped = sorted((rollback["skipped_from"], rollback["skipped_to"]) for rollback in self.rollbacks)
        for start, stop in skipped:
            if sample < stop and sample + self._batch > start:
                sample = stop
        return sample

    def before_update(self, proposal: UpdateProposal) -> bool:
        self._fault = self._find_fault(proposal.loss, proposal.gradient_norm) if self.is_enabled else None
        return self._fault is None

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        """Decides; see `actions`."""
        self.actions = []
        if self.is_enabled and result.overflow:
            self.actions = self._after_overflow(step)
        elif self.is_enabled:
            self.actions = self._after_update(step, result.loss, result.gradient_norm)
        return {}

    def _after_update(self, step: Step, loss: float, gradient_norm: float) -> list[Action]:
        number, sample = step.number, step.first_sample
        fault, self._fault = self._fault, None
        self._overflow_sample = None
        self._add(loss, gradient_norm)
        has_diverged = self._divergence is not None and fault is None and self._divergence.update(loss)
        is_rising = self._divergence is not None and self._divergence.is_rising
        self._rising_steps = self._rising_steps + 1 if is_rising else 0
        episode = self._episode_at(number)
        actions: list[Action] = []
        if fault is not None:
            episode = episode or _Episode(number, sample, number)
            episode = replace(episode, last_step=number, skips=episode.skips + 1)
            actions.append(Action("skip", number, fault))
            if episode.skips > self._config.max_skips:
                reason = f"{episode.skips} bad updates since step {episode.first_step}; last: {fault}"
                if episode.lowerings < self._config.max_lowerings:
                    actions.append(Action("lower_rate", number, reason))
                    episode = replace(episode, skips=0, lowerings=episode.lowerings + 1)
                    factor, since = self.rate_factor(number + 1) * self._config.rate_factor, number + 1
                    self._lowered = _Lowered(factor, since, since + self._config.rate_steps)
                else:
                    actions.append(self._roll_back(step, episode.first_sample, reason))
        elif has_diverged:
            reason = (
                f"the mean loss of the last {self._config.divergence_steps} steps is more than "
                f"{self._config.divergence:g} above the lowest such mean"
            )
            actions.append(self._roll_back(step, episode.first_sample if episode is not None else sample, reason))
        self._episode = episode
        return actions

    def _after_overflow(self, step: Step) -> list[Action]:
        if self._overflow_sample is None:
            self._overflow_sample = step.first_sample
        if (fault := self._overflow_fault()) is None:
            return []
        episode = self._episode_at(step.number)
        return [self._roll_back(step, self._overflow_sample if episode is None else episode.first_sample, fault)]

    def _roll_back(self, step: Step, first_sample: int, reason: str) -> Action:
        num_before = sum(map(_skips_data, self.rollbacks))
        if num_before >= self._config.max_rollbacks:
            return Action("give_up", step.number, f"{reason}; the run went back {num_before} time(s) already")
        if self.good_step is None:
            return Action("give_up", step.number, f"{reason}; there is no checkpoint from before that")
        start = max(0, first_sample - self._config.skip_before * self._batch)
        skipped = (start, step.first_sample + self._batch)
        return Action("rollback", step.number, reason, self.good_step, skipped)

    def go_back(self, step: int, reason: str, nodes: Mapping[int, str]) -> None:
        """Decides on a step that was computed wrong, whatever its numbers have led to: the run reads its data again.

        Args:
            step: The step.
            reason: What was found.
            nodes: The ranks at fault, each with its node.
        """
        self._num_wrong, self._wrong_step = self._num_wrong + 1, step
        ends_run = self._num_wrong > self._config.max_rollbacks
        if ends_run:
            reason += f"; the run went back {self._num_wrong - 1} time(s) and got no further"
        self.actions = [Action("rollback", step, reason, self.good_step, (0, 0), nodes, ends_run)]

    def note_clean_check(self, step: int) -> None:
        """Takes note of a step that was checked for corruption, and found right."""
        if step >= self._wrong_step:
            self._num_wrong = 0
        if self._unconfirmed_step is not None:
            self.good_step, self._unconfirmed_step = self._unconfirmed_step, None

    def note_checkpoint(self, step: int) -> None:
        """Makes a new checkpoint that of the next rollback, if there is no trouble and the loss is not rising.

        Where steps are checked for corruption, it first has to be confirmed by a later step that is right.
        """
        is_rising = 0 < self._rising_steps <= _RISING_WINDOWS * self._config.window
        is_calm = self._episode is None and self._overflow_sample is None
        is_good = self.is_enabled and is_calm and not is_rising
        if self._is_checked:
            # One that is not good makes an older one removable, which must then not be returned to.
            self._unconfirmed_step = step if is_good else None
        elif is_good:
            self.good_step, self._unconfirmed_step = step, None

    def begin_at(self, step: int) -> None:
        """Makes a checkpoint that of the next rollback because the run begins from it."""
        self.good_step, self._episode, self._overflow_sample = step, None, None
        self._unconfirmed_step = None

    def reset_statistics(self, step: int) -> None:
        """Drops the statistics of earlier steps, because a change makes them meaningless for those after `step`.

        Skipped samples stay skipped, and a lowered rate stays lowered.
        """
        self._clear_statistics()
        self._reset_at = step
        self.good_step, self._unconfirmed_step = step if self.is_enabled else None, None

    def note_rollback(self, action: Action) -> None:
        """Continues from the checkpoint of a rollback, whose state has been loaded."""
        assert action.to_step is not None and action.skipped is not None
        rollback = {
            "step": action.step,
            "to_step": action.to_step,
            "skipped_from": action.skipped[0],
            "skipped_to": action.skipped[1],
            "reason": action.reason,
        }
        self.adopt_rollbacks([*self.rollbacks, rollback], action.to_step)
        if action.to_step == self._reset_at:
            self.reset_statistics(action.to_step)

    def adopt_rollbacks(self, rollbacks: Sequence[Mapping[str, Any]], step: int) -> None:
        """Takes over rollbacks that the loaded state does not know, since it was saved before them.

        From the second rollback to the same step on, the data were not the only cause: the learning rate is lowered
        too, further with each of them.

        Args:
            rollbacks: All of the run, the oldest first.
            step: Of the checkpoint that was loaded. Unless it is that of the last rollback, only the samples count.
        """
        if len(rollbacks) <= len(self.rollbacks):
            return
        self.rollbacks = [dict(rollback) for rollback in rollbacks]
        if step != self.rollbacks[-1]["to_step"]:
            return
        self.begin_at(step)
        num_returns = sum(rollback["to_step"] == step and _skips_data(rollback) for rollback in self.rollbacks)
        if num_returns > 1:
            factor = self._config.rate_factor ** (num_returns - 1)
            self._lowered = _Lowered(factor, step + 1, step + 1 + self._config.rate_steps)

    def state(self) -> dict[str, Any]:
        return {
            "losses": self._losses.state(),
            "norms": self._norms.state(),
            "divergence": None if self._divergence is None else self._divergence.state(),
            "rising_steps": self._rising_steps,
            "overflow_sample": self._overflow_sample,
            "episode": None if self._episode is None else asdict(self._episode),
            "lowered": None if self._lowered is None else asdict(self._lowered),
            "good_step": self.good_step,
            "unconfirmed_step": self._unconfirmed_step,
            "forgot_at": self._reset_at,
            "rollbacks": self.rollbacks,
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        if state is None:  # of a checkpoint from before there was a guard
            return
        self._losses.load_state(state["losses"])
        self._norms.load_state(state["norms"])
        if self._divergence is not None and state["divergence"] is not None:
            self._divergence.load_state(state["divergence"])
        # Checkpoints of earlier versions lack the keys that are read by `get`.
        self._rising_steps = state.get("rising_steps", 0)
        self._overflow_sample = state.get("overflow_sample")
        self._episode = None if state["episode"] is None else _Episode(**state["episode"])
        self._lowered = None if state["lowered"] is None else _Lowered(**state["lowered"])
        self.good_step = state["good_step"]
        self._unconfirmed_step = state.get("unconfirmed_step") if self._is_checked else None
        if (reset_at := state.get("forgot_at")) is not None:  # a rollback leads to before the reset
            self._reset_at = reset_at
        if len(state["rollbacks"]) > len(self.rollbacks):
            self.rollbacks = [dict(rollback) for rollback in state["rollbacks"]]

    def _episode_at(self, step: int) -> _Episode | None:
        """Returns the episode that is not over at a step."""
        episode = self._episode
        return episode if episode is not None and step - episode.last_step <= self._config.calm_steps else None

    def _find_fault(self, loss: float, gradient_norm: float) -> str | None:
        curves = (("loss", loss, self._losses), ("gradient norm", gradient_norm, self._norms))
        for name, value, window in curves:
            if not math.isfinite(value):
                return f"{name} {value}"
            if len(window) >= self._config.min_window and value > (limit := self._limit(window)):
                return f"{name} {value:.6g} above {limit:.6g} (mean {window.mean:.6g}, deviation {window.std:.3g})"
        return None

    def _limit(self, window: Window) -> float:
        return window.mean + self._config.sigmas * window.std

    def _add(self, loss: float, gradient_norm: float) -> None:
        """Adds a step to the statistics; a bad value counts as the largest one that would have passed.

        Left out, values that have risen for good would always be bad; taken as they are, one would hide the next.
        """
        for value, window in ((loss, self._losses), (gradient_norm, self._norms)):
            if math.isfinite(value):
                is_judged = len(window) >= self._config.min_window
                window.append(min(value, self._limit(window)) if is_judged else value)


def _skips_data(rollback: Mapping[str, Any]) -> bool:
    """Whether data were the reason of a rollback, and not corruption."""
    return bool(rollback["skipped_from"] < rollback["skipped_to"])
