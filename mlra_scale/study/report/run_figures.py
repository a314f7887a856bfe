"""The figures of a run: loss and TEV, all measures over steps, and the measures per block at three steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mlra_scale.study.report import style
from mlra_scale.study.report.records import Array, Keys, RunRecord, block_values, series, task_figures
from mlra_scale.training.run_reader import Record, is_number

Kind = Literal["free", "linear", "share"]

_LOGGED, _ACTIVATIONS, _TEV_UNIT = "a logged step", "activations.every", "TEV\n(unit of the weights)"
TEV_MEAN, TEV_SPREAD, EVENTS = "TEV: mean and spread over tokens", "TEV: its distribution over tokens", "Events"
_NORMS, _VARIANCES = "Gradient norm, before clipping", "Gradient variance over elements"
_STREAM, _LOGITS = "Activations: variance of the residual stream", "Activations: attention logits"
_ENTROPY, _SATURATION = "Activations: attention entropy", "Activations: saturated attention rows"
TEXTS, ACCURACY = "Perplexity of texts", "Accuracy, of lm-evaluation-harness"
PANELS: dict[str, tuple[str, str, Kind]] = {
    "Loss": ("loss\n(nats per token)", f"{_LOGGED} (train.log_every)", "free"),
    TEXTS: ("perplexity\n(per token)", "evaluation.tasks", "free"),
    ACCURACY: ("share (%)", "evaluation.tasks with harness:NAME", "share"),
    TEV_MEAN: (_TEV_UNIT, "tev.every", "linear"),
    TEV_SPREAD: (_TEV_UNIT, "tev.every and tev.quantiles", "linear"),
    "Learning rate": ("learning rate", _LOGGED, "free"),
    _NORMS: ("gradient norm", f"{_LOGGED}; by kind: gradients.every", "free"),
    _VARIANCES: ("gradient variance", "gradients.every", "free"),
    "Gradient noise scale": ("noise scale\n(samples)", "gradients.noise_every", "free"),
    _STREAM: ("variance,\nlargest of blocks", _ACTIVATIONS, "free"),
    _LOGITS: ("largest logit", _ACTIVATIONS, "free"),
    _ENTROPY: ("entropy (nats),\nlowest of blocks", _ACTIVATIONS, "linear"),
    _SATURATION: ("share (%),\nlargest of blocks", _ACTIVATIONS, "share"),
    "Spike scores": ("share of steps (%)", f"{_LOGGED} of a run that records spike scores", "share"),
}
"""By title: the label of the y axis, what has to be set for it to be measured, the scale; shares are in per cent."""
_BLOCK_NORMS, _BLOCK_VARIANCES = "gradients.layers.gradient_norm", "gradients.layers.gradient_variance"
_OVER_SHALLOW: dict[Keys, Callable[[Array], Any]] = {_BLOCK_NORMS: np.linalg.norm, _BLOCK_VARIANCES: np.mean}
"""What reduces a list over blocks to one number for the shallow blocks."""
CURVES: tuple[tuple[str, str, Keys], ...] = (
    ("Loss", "training", "loss"),
    ("Loss", "validation", "validation_loss"),
    ("Loss", "training, mean of the interval", "loss_mean"),
    (TEV_MEAN, "mean over tokens", "tev_mean"),
    ("Learning rate", "learning rate", "learning_rate"),
    (_NORMS, "all parameters", "gradient_norm"),
    (_NORMS, "embedding", "gradients.kinds.embedding.gradient_norm"),
    (_NORMS, "shallow blocks", _BLOCK_NORMS),
    (_VARIANCES, "all parameters", "gradients.kinds.all.gradient_variance"),
    (_VARIANCES, "embedding", "gradients.kinds.embedding.gradient_variance"),
    (_VARIANCES, "shallow blocks", _BLOCK_VARIANCES),
    ("Gradient noise scale", "noise scale", "noise.scale"),
    (_STREAM, "residual variance", "activations.max_residual_variance"),
    (_LOGITS, "largest attention logit", "activations.max_logit"),
    (_ENTROPY, "attention entropy", "activations.min_attention_entropy"),
    (_SATURATION, "saturated rows", "activations.max_saturated_share"),
    ("Spike scores", "loss, OLMo 2", "spike_scores.loss_olmo2"),
    ("Spike scores", "gradient, OLMo 2", "spike_scores.gradient_olmo2"),
    ("Spike scores", "loss, OLMo-core", "spike_scores.loss_olmo_core"),
    ("Spike scores", "gradient, OLMo-core", "spike_scores.gradient_olmo_core"),
)
"""The panel of each curve, its name, and where its values are in a record."""


@style.drawing()
def overview_figure(run: RunRecord) -> bytes | None:
    """Draws loss and TEV side by side, for a first look; None without any."""
    found = {panel for panel, _, keys in CURVES if _is_there(run.metrics, keys)}
    titles = [title for title in ("Loss", TEV_MEAN) if title in found]
    if not titles:
        return None
    figure = style.new_figure(2.9)
    grid = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, title in zip(grid, titles, strict=True):
        _draw_panel(axes, run, title)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.legend(loc="best", handlelength=3.2)
    return style.as_png(figure)


@style.drawing()
def time_figure(run: RunRecord) -> tuple[bytes | None, list[str]]:
    """Draws all measures over steps, one below the other on one axis.

    Returns:
        The figure as PNG (None: there is nothing to draw), and a sentence for each panel that is missing.
    """
    levels, rows = _quantile_levels(run), event_rows(run)
    measured = {panel for panel, _, keys in curves_of(run) if _is_there(run.metrics, keys)}
    measured |= {TEV_SPREAD} if levels else set()
    missing = [f"{title}: not measured (needs {PANELS[title][1]})." for title in PANELS if title not in measured]
    if not rows:
        missing.append("Events: none but starts and checkpoints.")
    titles = [*(title for title in PANELS if title in measured), *[EVENTS] * bool(rows)]
    if not titles:
        return None, missing
    heights = [1.5 if title != EVENTS else 0.45 + 0.24 * len(rows) for title in titles]
    figure = style.new_figure(sum(heights) + 0.3 * len(heights) + 0.4)
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, title in zip(grid, titles, strict=True):
        if title == EVENTS:
            _draw_events(axes, run, rows)
        elif title == TEV_SPREAD:
            _draw_quantiles(axes, {level: run.series(("tev_quantiles", level)) for level in levels})
        else:
            _draw_panel(axes, run, title)
        axes.set_title(title)
        _mark_guard(axes, run)
        style.legend_beside(axes)
    _finish_step_axis(list(grid), run)
    return style.as_png(figure), missing


def curves_of(run: RunRecord) -> list[tuple[str, str, Keys]]:
    """Returns CURVES, with one for each text and each accuracy that the run has measured."""
    texts = [(name, figure) for name, figure in task_figures(run, "tasks") if figure == "token_perplexity"]
    accuracies = [(name, figure) for name, figure in task_figures(run, "harness") if figure.startswith("acc")]
    return [
        *CURVES,
        *((TEXTS, name, ("tasks", name, figure)) for name, figure in texts),
        *((ACCURACY, f"{name}: {figure}", ("harness", name, figure)) for name, figure in accuracies),
    ]


def _read(records: list[Record], keys: Keys) -> pd.Series:
    return series(records, keys, _OVER_SHALLOW.get(keys))


def _is_there(records: list[Record], keys: Keys) -> bool:
    return bool(_read(records, keys).notna().any())


def _finish_step_axis(grid: list[Axes], run: RunRecord) -> None:
    recorded = [record["step"] for record in (*run.metrics, *run.rolled_back)]
    last = max([1, *recorded, *(_step_of(event, run) for event in run.events)])
    grid[-1].set_xlim(-0.015 * last, 1.02 * last)
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    # The figure is tall: the steps are at its upper end too.
    grid[0].tick_params(axis="x", labeltop=len(grid) > 3, labelbottom=len(grid) == 1)


def _draw_panel(axes: Axes, run: RunRecord, title: str) -> None:
    unit, _, kind = PANELS[title]
    factor = 100.0 if kind == "share" else 1.0
    rollbacks: dict[str, list[Record]] = {}
    for record in run.rolled_back:
        rollbacks.setdefault(str(record.get("rollback")), []).append(record)
    drawn, has_undone = [], False
    if title == TEV_MEAN:
        drawn += _draw_band(axes, run)
    curves = [(name, keys) for panel, name, keys in curves_of(run) if panel == title]
    for index, (name, keys) in enumerate(curves):
        how = style.look(index)
        for records in rollbacks.values():
            if (values := factor * _read(records, keys)).notna().any():
                style.curve(axes, values.index, values, {**style.UNDONE, "marker": how["marker"]})
                drawn.append(values)
                has_undone = True
        if (values := factor * _read(run.metrics, keys)).notna().any():
            style.curve(axes, values.index, values, how, name)
            drawn.append(values)
    if has_undone:
        undone = {key: style.UNDONE[key] for key in ("color", "ls", "lw")}
        axes.plot([], [], label=style.label("rolled back: not part of the run"), **undone)
    style.choose_scale(axes, np.concatenate(drawn), unit, kind)


def _draw_band(axes: Axes, run: RunRecord) -> list[pd.Series]:
    mean = run.series("tev_mean")
    spread = run.series("tev_std").reindex(mean.index)
    low, high = mean - spread, mean + spread
    if spread.notna().any():
        axes.fill_between(mean.index, low, high, color="0.82", lw=0, label=style.label("mean +- standard deviation"))
        if mean.size == 1:
            axes.errorbar(mean.index, mean, spread, color="0.5", capsize=3)
    return [low, high]


def _quantile_levels(run: RunRecord) -> list[str]:
    """Returns the measured quantiles of TEV, by their keys in the record."""
    quantiles = [record.get("tev_quantiles") for record in run.metrics]
    keys = {key for item in quantiles if isinstance(item, Mapping) for key in item if isinstance(key, str)}
    numbers = pd.to_numeric(pd.Series(sorted(keys), sorted(keys), dtype=object), errors="coerce").astype(float)
    levels = numbers[np.isfinite(numbers)].sort_values().index
    return [level for level in levels if _is_there(run.metrics, ("tev_quantiles", level))]


def _draw_quantiles(axes: Axes, found: Mapping[str, pd.Series]) -> None:
    """Draws bands between quantiles q and 1 - q, the inner ones darker, and the other quantiles as lines."""
    levels = list(found)
    bands = [(low, high) for low, high in zip(levels, reversed(levels), strict=True) if float(low) < float(high)]
    bands = [pair for pair in bands if math.isclose(float(pair[0]) + float(pair[1]), 1.0, abs_tol=1e-9)]
    for index, (low, high) in enumerate(bands):
        shade = f"{0.86 - 0.22 * index / max(1, len(bands) - 1):.2f}" if len(bands) > 1 else "0.8"
        lower, upper = found[low].align(found[high], join="inner")
        name = style.label(f"{float(low):.0%} to {float(high):.0%}")
        axes.fill_between(lower.index, lower, upper, color=shade, lw=0, label=name)
        if lower.size == 1:
            axes.plot([*lower.index] * 2, [*lower, *upper], color=shade, lw=6 + 3 * index)
    lines = [level for level in levels if level not in {end for pair in bands for end in pair}]
    for index, level in enumerate(lines):
        name = "median" if float(level) == 0.5 else f"{float(level):.0%}"
        style.curve(axes, found[level].index, found[level], style.look(index), name)
    style.choose_scale(axes, np.concatenate([*found.values()]), _TEV_UNIT, "linear")


# Event -> its row in the panel of events, from the top down, and its marker. Rows without events are left out.
_EVENT_ROWS = {
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
_GUARD_LINES = {"guard_rollback": "-", "guard_lower_rate": "-.", "guard_skip": ":"}


def event_rows(run: RunRecord) -> list[str]:
    """Returns the kinds of events that are drawn, from the top down; [] if there are checkpoints only."""
    found = {event for event in _EVENT_ROWS if run.events_named(event)}
    if any(is_number(item.get("until")) for item in run.events_named("guard_rollback")):
        found.add("guard_lower_rate")
    return [event for event in _EVENT_ROWS if event in found] if found - {"checkpoint"} else []


def _draw_events(axes: Axes, run: RunRecord, rows: list[str]) -> None:
    """Draws every event in its row; bars show how far a rollback returned and how long a rate was lowered."""
    bar: dict[str, Any] = {"color": "#555555", "lw": 2.0, "solid_capstyle": "butt"}
    heights = {event: height for height, event in enumerate(reversed(rows))}
    for event, height in heights.items():
        for item in run.events_named(event):
            step, back, until = _step_of(item, run), item.get("to_step"), item.get("until")
            axes.plot([step], [height], ls="", marker=_EVENT_ROWS[event][1], color="#111111", ms=6)
            if event == "guard_rollback" and is_number(back):
                axes.plot([step, back], [height, height], **bar)
                axes.plot([back], [height], ls="", marker="|", color="#111111", ms=8)
            # A rollback to a checkpoint that was returned to before lowers the rate too.
            if event in ("guard_rollback", "guard_lower_rate") and is_number(until):
                first = back if event == "guard_rollback" and is_number(back) else step
                axes.plot([first, until], [heights["guard_lower_rate"]] * 2, **bar)
    axes.set_yticks(range(len(rows)), [_EVENT_ROWS[event][0] for event in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", visible=True)


def _step_of(event: Record, run: RunRecord) -> float:
    """Returns the step of an event; an event without one is at the last recorded step."""
    step = event.get("step")
    return float(step) if is_number(step) else float(run.last_step)


def _mark_guard(axes: Axes, run: RunRecord) -> None:
    """Draws a vertical line at each of up to 60 interventions of the guard; more would hide the data."""
    for event, line in _GUARD_LINES.items():
        if len(found := run.events_named(event)) <= 60:
            for item in found:
                axes.axvline(_step_of(item, run), color="0.4", lw=0.9, ls=line, zorder=0.5)


_SATURATED, _RESIDUAL = "Saturated rows", "Residual stream"
PROFILES = {
    "Gradient norm": (_BLOCK_NORMS, "gradient norm"),
    "Gradient variance": (_BLOCK_VARIANCES, "gradient variance"),
    "Mean of gradients": ("gradients.layers.gradient_mean", "mean over elements"),
    "Norm of weights": ("gradients.layers.weight_norm", "||weight||"),
    "Size of updates": ("gradients.layers.update_ratio", "||update|| / ||weight||"),
    "Spectral norm of q k": ("gradients.layers.qk_spectral_norm", "largest singular value"),
    "Spectral norm of o v": ("gradients.layers.ov_spectral_norm", "largest singular value"),
    _RESIDUAL: ("activations.residual_variance", "variance"),
    "Attention entropy": ("activations.attention_entropy", "entropy (nats)"),
    "Attention logits": ("activations.largest_logit", "largest logit"),
    _SATURATED: ("activations.saturated_share", "share"),
}


@style.drawing()
def profile_figure(run: RunRecord) -> bytes | None:
    """Draws the measures per block at the first, the middle and the last measurement; None without any."""
    found = {title: profiles for title in PROFILES if (profiles := _profiles(run, PROFILES[title][0]))}
    if not found:
        return None
    rows = math.ceil(len(found) / 2)
    figure = style.new_figure(2.1 * rows + 0.3)
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (title, profiles) in zip(grid, found.items(), strict=False):
        for index, (step, values) in enumerate(profiles):
            style.curve(axes, np.arange(values.size, dtype=float), values, style.look(index), f"step {step:g}")
        axes.set_title(title)
        kind: Kind = "share" if title == _SATURATED else "free"
        style.choose_scale(axes, np.concatenate([v for _, v in profiles]), PROFILES[title][1], kind)
        # The residual stream is measured at the input of every block and after the last one.
        axes.set_xlabel("input of block (the last: output)" if title == _RESIDUAL else "block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        style.legend_beside(axes)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    return style.as_png(figure)


def _profiles(run: RunRecord, dotted: str) -> list[tuple[float, Array]]:
    found = [(r["step"], v) for r in run.metrics if (v := block_values(r, dotted)) is not None and np.isfinite(v).any()]
    return [found[index] for index in sorted({0, len(found) // 2, len(found) - 1})] if found else []
