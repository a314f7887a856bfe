"""The next attempt, made ready while the present one runs: its ranks have loaded their libraries and wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from mlra_scale.cluster.job.attempt import AttemptRunner
from mlra_scale.cluster.job.step import AttemptPlan

_DELAY_SECONDS = 10.0
"""How long the ranks must have trained before others are started beside them: what fails at once may do so again."""


class Spare:
    """At most one attempt that waits; its end, however it comes, only means that the next attempt starts from nothing.

    Args:
        make: Makes an attempt.
        say: Prints a line for the user.
    """

    def __init__(self, make: Callable[[AttemptPlan], AttemptRunner], say: Callable[[str], None]) -> None:
        self._make, self._say = make, say
        self._plan: AttemptPlan | None = None
        self._start_at = 0.0
        self._runner: AttemptRunner | None = None
        self._has_said = False

    def plan(self, plan: AttemptPlan) -> None:
        """Plans spare ranks, to be started when the present attempt has trained for a while."""
        self._plan = plan
        self._start_at = time.monotonic() + _DELAY_SECONDS

    def tend(self) -> None:
        """Starts what is planned when it is time, once; called several times a second."""
        if self._runner is not None:
            state = self._runner.wait()
            if state == "waiting" and not self._has_said:
                self._say("spare ranks have loaded their libraries and wait")
                self._has_said = True
            if state == "failed":
                where = self._plan.logs if self._plan is not None else "the logs"
                self._say(f"the spare ranks have failed ({self._runner.failure}; see {where}); a restart has none")
                self._runner.discard(keeps_logs=True)
                self._runner = self._plan = None
        elif self._plan is not None and time.monotonic() > self._start_at:
            self._runner, self._has_said = self._make(self._plan), False
            try:
                self._runner.prepare(is_spare=True)
            except (OSError, RuntimeError) as error:  # a full disk; no descriptor or thread left
                self._say(f"no spare ranks: {error}")
                self.discard()

    def take(self, plan: AttemptPlan) -> AttemptRunner | None:
        """Returns the attempt that waits, if it is this one and can begin; another one is ended.

        A restart on fewer nodes does not wait for the others.
        """
        if self._runner is None or self._plan != plan or not self._runner.can_begin():
            self.discard(set(self._plan.nodes) - set(plan.nodes) if self._plan is not None else ())
            return None
        runner, self._runner, self._plan = self._runner, None, None
        return runner

    def discard(self, lost: Collection[str] = ()) -> None:
        """Ends the ranks that wait, and starts none; those on `lost` nodes are not waited for."""
        if self._runner is not None and self._plan is not None:
            self._runner.discard(lost={*lost} & {*self._plan.nodes})
        self._runner, self._plan = None, None
