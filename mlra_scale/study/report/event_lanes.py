"""What happened to a run, and when: its events on the axis of steps, in lanes by kind."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from mlra_scale.study.report.run_record import Record, RunRecord, is_number

# Event -> its lane and its marker, from the top down. Lanes without events are left out.
_LANES = {
    "guard_skip": ("update skipped", "x"),
    "guard_lower_rate": ("rate lowered", "v"),
    "guard_rollback": ("rolled back", "<"),
    "guard_give_up": ("guard gave up", "X"),
    "resume": ("resumed", ">"),
    "stopped": ("stopped", "s"),
    "failed": ("failed", "P"),
    "preempted": ("preempted", "D"),
    "interrupted": ("interrupted", "d"),
    "checkpoint": ("checkpoint", "."),
}
_DULL = {"checkpoint"}
_BAR: dict[str, Any] = {"color": "#555555", "lw": 2.0, "solid_capstyle": "butt"}


def lanes_of(run: RunRecord) -> list[str]:
    """Returns the kinds of events that there were, from the top down; checkpoints alone are none worth a panel."""
    is_there = {event for event in _LANES if run.events_named(event)}
    if any(is_number(item.get("until")) for item in run.events_named("guard_rollback")):
        is_there.add("guard_lower_rate")
    found = [event for event in _LANES if event in is_there]
    return found if set(found) - _DULL else []


def draw_events(axes: Axes, run: RunRecord, lanes: list[str]) -> None:
    """Draws every event in the lane of its kind, with a bar for the way back and for how long a rate is lowered.

    Args:
        axes: Where.
        run: The run.
        lanes: What `lanes_of` returned.
    """
    heights = {event: height for height, event in enumerate(reversed(lanes))}
    for event, height in heights.items():
        _, marker = _LANES[event]
        found = run.events_named(event)
        steps = [step_of(item, run) for item in found]
        axes.plot(steps, [height] * len(steps), ls="", marker=marker, color="#111111", ms=6)
        for step, item in zip(steps, found, strict=True):
            back, until = item.get("to_step"), item.get("until")
            if event == "guard_rollback" and is_number(back):
                axes.plot([step, back], [height, height], **_BAR)
                axes.plot([back], [height], ls="", marker="|", color="#111111", ms=8)
            # How long a lowered rate lasts, also that of a return to a checkpoint that has been gone back to before.
            if event in ("guard_rollback", "guard_lower_rate") and is_number(until):
                first = back if event == "guard_rollback" and is_number(back) else step
                axes.plot([first, until], [heights["guard_lower_rate"]] * 2, **_BAR)
    axes.set_yticks(range(len(lanes)), [_LANES[event][0] for event in reversed(lanes)])
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    axes.grid(axis="x", visible=True)


def step_of(event: Record, run: RunRecord) -> float:
    """Returns the step of an event; one without is at the end of what is recorded."""
    step = event.get("step")
    return float(step) if is_number(step) else float(run.last_step)


_GUARD_LINES = {"guard_rollback": "-", "guard_lower_rate": "-.", "guard_skip": ":"}


def mark_guard(axes: Axes, run: RunRecord) -> None:
    """Draws the guard's interventions through a panel; very many skips would hide the data."""
    for event, line in _GUARD_LINES.items():
        found = run.events_named(event)
        if len(found) <= 60:
            for item in found:
                axes.axvline(step_of(item, run), color="0.4", lw=0.9, ls=line, zorder=0.5)
