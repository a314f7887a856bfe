"""The guard: what is done about instability while it happens.

From the loss and the gradient norm of a step, which are the same numbers on every rank, it decides in this order:
1. An update whose loss or gradient norm stands far out of the last steps is left out (as OLMo-core's skip-step does).
2. If that is not enough, the learning rate is lowered for a while.
3. If that is not enough either, or if the loss has left for good, the run goes back to the last checkpoint from before
   the trouble, and does not read the data again that it met then (Chowdhery et al. 2022 (PaLM), sec. 5.1).
4. After a number of such returns it gives up.
In fp16 a step whose gradient overflows its loss scale is none of these: the scale comes down, and that is all. A long
row of them leads to 3 at once.

Here are decisions only; `training` carries them out. Everything is pure arithmetic over numbers that all ranks share,
so every layout decides alike, and the state goes through a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mlra_scale.config import GuardConfig
from mlra_scale.stability.spikes import Divergence, Window

_RISING_WINDOWS = 8
"""So many windows long a loss may be on its way up; one that has been higher for longer has come to stay there."""


@dataclass(frozen=True)
class Action:
    """What the guard has decided after a step.

    Attributes:
        kind: skip: the update was left out. lower_rate: the learning rate is lowered from the next step on. rollback:
            the run goes back. give_up: it stops.
        step: The step.
        reason: In words, with the numbers.
        to_step: For a rollback: the checkpoint to go back to.
        skipped: For a rollback: places in the data (first, one after the last) that are not read again.
    """

    kind: Literal["skip", "lower_rate", "rollback", "give_up"]
    step: int
    reason: str
    to_step: int | None = None
    skipped: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Episode:
    """Trouble: from its first bad update until `calm_steps` have passed without one.

    Attributes:
        first_step: Step of the first bad update.
        first_sample: Place in the data of that step.
        last_step: Step of the last one.
        skips: Bad updates since the last lowering.
        lowerings: How often the rate was lowered.
    """

    first_step: int
    first_sample: int
    last_step: int
    skips: int = 0
    lowerings: int = 0


@dataclass(frozen=True)
class _Lowered:
    """A learning rate that was lowered: by `factor` at `since`, back on the schedule at `until`."""

    factor: float
    since: int
    until: int


class Guard:
    """Watches a run.

    Args:
        config: Thresholds.
        batch: Samples of a step, over all ranks.
    """

    def __init__(self, config: GuardConfig, batch: int) -> None:
        self._config, self._batch = config, batch
        self._watch_anew()
        self._forgot_at: int | None = None
        self._lowered: _Lowered | None = None
        self._good_step: int | None = None
        self._rollbacks: list[dict[str, Any]] = []
        self._fault: str | None = None

    def _watch_anew(self) -> None:
        """Knows of no step: nothing is usual yet, the loss has not been lower, and there is no trouble."""
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
        """Whether it does anything."""
        return self._config.enabled

    @property
    def num_rollbacks(self) -> int:
        """How often the run went back."""
        return len(self._rollbacks)

    @property
    def rollbacks(self) -> Sequence[Mapping[str, Any]]:
        """What has to be remembered of every rollback, beyond the checkpoint that the run went back to."""
        return self._rollbacks

    @property
    def good_step(self) -> int | None:
        """Step of the checkpoint to go back to, which must be kept; None: there is none."""
        return self._good_step

    def rate_factor(self, step: int) -> float:
        """Returns what the scheduled learning rate of a step is multiplied by."""
        lowered = self._lowered
        if lowered is None or self.lowered_until(step) is None:
            return 1.0
        done = (step - lowered.since) / (lowered.until - lowered.since)
        return lowered.factor + (1.0 - lowered.factor) * done

    def lowered_until(self, step: int) -> int | None:
        """Returns the first step that is back on the schedule; None: this step is on it."""
        lowered = self._lowered
        return lowered.until if lowered is not None and lowered.since <= step < lowered.until else None

    def place(self, sample: int) -> int:
        """Returns where the next batch is read, past the data that are skipped.

        Args:
            sample: Where it would be read.
        """
        windows = sorted((rollback["skipped_from"], rollback["skipped_to"]) for rollback in self._rollbacks)
        for start, stop in windows:
            if sample < stop and sample + self._batch > start:
                sample = stop
        return sample

    def approve(self, loss: float, gradient_norm: float) -> bool:
        """Returns whether an update may be applied; before it."""
        self._fault = self._find_fault(loss, gradient_norm) if self.is_enabled else None
        return self._fault is None

    def judge(self, step: int, sample: int, loss: float, gradient_norm: float) -> list[Action]:
        """Decides after a step that `approve` was asked about.

        Args:
            step: The step.
            sample: Place in the data at which it began.
            loss: Its loss.
            gradient_norm: Its gradient norm.

        Returns:
            What has happened and what has to be done, in order; at most the last one is a rollback or the end.
        """
        if not self.is_enabled:
            return []
        fault, self._fault = self._fault, None
        self._overflow_sample = None
        self._remember(loss, gradient_norm)
        has_diverged = self._divergence is not None and fault is None and self._divergence.update(loss)
        is_rising = self._divergence is not None and self._divergence.is_rising
        self._rising_steps = self._rising_steps + 1 if is_rising else 0
        episode = self._episode_at(step)
        actions: list[Action] = []
        if fault is not None:
            episode = episode or _Episode(step, sample, step)
            episode = replace(episode, last_step=step, skips=episode.skips + 1)
            actions.append(Action("skip", step, fault))
            if episode.skips > self._config.max_skips:
                text = f"{episode.skips} bad updates since step {episode.first_step}; last: {fault}"
                if episode.lowerings < self._config.max_lowerings:
                    actions.append(Action("lower_rate", step, text))
                    episode = replace(episode, skips=0, lowerings=episode.lowerings + 1)
                    self._lower(step)
                else:
                    actions.append(self._go_back(step, sample, episode.first_sample, text))
        elif has_diverged:
            text = (
                f"the mean loss of the last {self._config.divergence_steps} steps is more than "
                f"{self._config.divergence:g} above the lowest such mean"
            )
            first = episode.first_sample if episode is not None else sample
            actions.append(self._go_back(step, sample, first, text))
        self._episode = episode
        return actions

    def overflowed(self, step: int, sample: int, hopeless: str | None) -> list[Action]:
        """Decides after a step whose gradient overflowed the loss scale: its update is gone, and `approve` not asked.

        Args:
            step: The step.
            sample: Place in the data at which it began.
            hopeless: Why this is more than a loss scale that comes down, in words; None: it is not.

        Returns:
            As `judge`.
        """
        if not self.is_enabled:
            return []
        if self._overflow_sample is None:
            self._overflow_sample = sample
        if hopeless is None:
            return []
        episode = self._episode_at(step)
        first = self._overflow_sample if episode is None else episode.first_sample
        return [self._go_back(step, sample, first, hopeless)]

    def saved(self, step: int) -> None:
        """Notes a checkpoint: one to go back to if there is no trouble now, and the loss is not on its way up."""
        is_rising = 0 < self._rising_steps <= _RISING_WINDOWS * self._config.window
        is_calm = self._episode is None and self._overflow_sample is None
        if self.is_enabled and is_calm and not is_rising:
            self._good_step = step

    def begins_at(self, step: int) -> None:
        """Makes a checkpoint the one to go back to, whatever was before it: the run begins from it."""
        self._good_step, self._episode, self._overflow_sample = step, None, None

    def forget(self, step: int) -> None:
        """Judges what comes after a step by itself: the run goes on with something that changes what is usual.

        What is usual after it is learned as at the start of a run. Data that are skipped stay skipped, and a lowered
        rate stays lowered.

        Args:
            step: Of the checkpoint that the run goes on from; its own record of what was usual is of no use either.
        """
        self._watch_anew()
        self._forgot_at = step
        self._good_step = step if self.is_enabled else None

    def went_back(self, action: Action) -> None:
        """Goes on from the checkpoint of a rollback, whose state has been loaded.

        Args:
            action: The rollback.
        """
        assert action.to_step is not None and action.skipped is not None
        rollback = {
            "step": action.step,
            "to_step": action.to_step,
            "skipped_from": action.skipped[0],
            "skipped_to": action.skipped[1],
            "reason": action.reason,
        }
        self.recall([*self._rollbacks, rollback], action.to_step)
        if action.to_step == self._forgot_at:
            self.forget(action.to_step)

    def recall(self, rollbacks: Sequence[Mapping[str, Any]], step: int) -> None:
        """Takes over rollbacks that the loaded state may not know of; the first one of them is the oldest.

        A rollback is no part of the checkpoint that it leads to. From the second one to the same step on, data were
        not the cause alone: the learning rate is lowered too, each time further.

        Args:
            rollbacks: All of the run so far.
            step: Of the checkpoint that was loaded. If it is not the one of the last rollback, data stay skipped, and
                that is all.
        """
        if len(rollbacks) <= len(self._rollbacks):
            return
        self._rollbacks = [dict(rollback) for rollback in rollbacks]
        if step != self._rollbacks[-1]["to_step"]:
            return
        self.begins_at(step)
        num_returns = sum(rollback["to_step"] == step for rollback in self._rollbacks)
        if num_returns > 1:
            factor = self._config.rate_factor ** (num_returns - 1)
            self._lowered = _Lowered(factor, step + 1, step + 1 + self._config.rate_steps)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        return {
            "losses": self._losses.state(),
            "norms": self._norms.state(),
            "divergence": None if self._divergence is None else self._divergence.state(),
            "rising_steps": self._rising_steps,
            "overflow_sample": self._overflow_sample,
            "episode": None if self._episode is None else asdict(self._episode),
            "lowered": None if self._lowered is None else asdict(self._lowered),
            "good_step": self._good_step,
            "forgot_at": self._forgot_at,
            "rollbacks": self._rollbacks,
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from what `state` returned; None: of a checkpoint from before there was a guard."""
        if state is None:
            return
        self._losses.load(state["losses"])
        self._norms.load(state["norms"])
        if self._divergence is not None and state["divergence"] is not None:
            self._divergence.load(state["divergence"])
        # A checkpoint from before these were kept has none of them.
        self._rising_steps = state.get("rising_steps", 0)
        self._overflow_sample = state.get("overflow_sample")
        self._episode = None if state["episode"] is None else _Episode(**state["episode"])
        self._lowered = None if state["lowered"] is None else _Lowered(**state["lowered"])
        self._good_step = state["good_step"]
        if (forgot_at := state.get("forgot_at")) is not None:  # not so in one from before the change
            self._forgot_at = forgot_at
        if len(state["rollbacks"]) > len(self._rollbacks):
            self._rollbacks = [dict(rollback) for rollback in state["rollbacks"]]

    def _episode_at(self, step: int) -> _Episode | None:
        """Returns the trouble that is not over at a step."""
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

    def _remember(self, loss: float, gradient_norm: float) -> None:
        """Adds a step to what is usual; a bad one counts as the worst that would have passed.

        Left out altogether, values that have risen for good would be bad for ever; taken as they are, one of them would
        hide the next.
        """
        for value, window in ((loss, self._losses), (gradient_norm, self._norms)):
            if math.isfinite(value):
                is_judged = len(window) >= self._config.min_window
                window.append(min(value, self._limit(window)) if is_judged else value)

    def _lower(self, step: int) -> None:
        since = step + 1
        self._lowered = _Lowered(
            self.rate_factor(since) * self._config.rate_factor, since, since + self._config.rate_steps
        )

    def _go_back(self, step: int, sample: int, first_sample: int, text: str) -> Action:
        if self.num_rollbacks >= self._config.max_rollbacks:
            return Action("give_up", step, f"{text}; the run went back {self.num_rollbacks} time(s) already")
        if self._good_step is None:
            return Action("give_up", step, f"{text}; there is no checkpoint from before that")
        start = max(0, first_sample - self._config.skip_before * self._batch)
        return Action("rollback", step, text, self._good_step, (start, sample + self._batch))
