"""The figures of one run: everything on one axis of steps, and the newest profiles over the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mlra_scale.study.report import style
from mlra_scale.study.report.event_lanes import draw_events, lanes_of, mark_guard, step_of
from mlra_scale.study.report.run_record import (
    Extract,
    Record,
    RunRecord,
    Series,
    at,
    is_number,
    named,
    number_or_nan,
    of_shallow_blocks,
    over_blocks,
    quantile_named,
    series_of,
)

_PANEL_HEIGHT = 1.5


@dataclass(frozen=True)
class Panel:
    """One plot of curves over steps.

    Attributes:
        title: What it shows.
        unit: The y axis's label.
        curves: By name, what reads each from a record.
        needs: What has to be set for it to be measured.
        factor: What values are multiplied by, 100 for shares in per cent.
        kind: Of the scale (style.choose_scale).
    """

    title: str
    unit: str
    curves: Mapping[str, Extract]
    needs: str
    factor: float = 1.0
    kind: Literal["free", "linear", "share"] = "free"


def _norm_of(values: np.ndarray) -> float:
    return float(np.linalg.norm(values))


PANELS = (
    Panel(
        "Loss",
        "loss\n(nats per token)",
        {"training": named("loss"), "validation": named("validation_loss")},
        "a logged step (train.log_every)",
    ),
    Panel("Learning rate", "learning rate", {"learning rate": named("learning_rate")}, "a logged step"),
    Panel(
        "Gradient norm, before clipping",
        "gradient norm",
        {
            "all parameters": named("gradient_norm"),
            "embedding": named("gradients.kinds.embedding.gradient_norm"),
            "shallow blocks": of_shallow_blocks("gradients.layers.gradient_norm", _norm_of),
        },
        "a logged step; by kind: gradients.every",
    ),
    Panel(
        "Gradient variance over elements",
        "gradient variance",
        {
            "all parameters": named("gradients.kinds.all.gradient_variance"),
            "embedding": named("gradients.kinds.embedding.gradient_variance"),
            "shallow blocks": of_shallow_blocks("gradients.layers.gradient_variance", np.mean),
        },
        "gradients.every",
    ),
    Panel(
        "Gradient noise scale", "noise scale\n(samples)", {"noise scale": named("noise.scale")}, "gradients.noise_every"
    ),
    Panel(
        "Activations: variance of the residual stream",
        "variance,\nlargest of blocks",
        {"residual variance": named("activations.max_residual_variance")},
        "activations.every",
    ),
    Panel(
        "Activations: attention logits",
        "largest logit",
        {"largest attention logit": named("activations.max_logit")},
        "activations.every",
    ),
    Panel(
        "Activations: attention entropy",
        "entropy (nats),\nlowest of blocks",
        {"attention entropy": named("activations.min_attention_entropy")},
        "activations.every",
        kind="linear",
    ),
    Panel(
        "Activations: saturated attention rows",
        "share (%),\nlargest of blocks",
        {"saturated rows": named("activations.max_saturated_share")},
        "activations.every",
        factor=100.0,
        kind="share",
    ),
    Panel(
        "Spike scores",
        "share of steps (%)",
        {
            "loss, OLMo 2": named("spike_scores.loss_olmo2"),
            "gradient, OLMo 2": named("spike_scores.gradient_olmo2"),
            "loss, OLMo-core": named("spike_scores.loss_olmo_core"),
            "gradient, OLMo-core": named("spike_scores.gradient_olmo_core"),
        },
        "a logged step of a run that records spike scores",
        factor=100.0,
        kind="share",
    ),
)
TEV_MEAN, TEV_SPREAD = "TEV: mean and spread over tokens", "TEV: its distribution over tokens"
EVENTS = "Events"


def time_figure(run: RunRecord) -> tuple[bytes | None, list[str]]:
    """Draws everything that was measured over steps, below each other on one axis.

    Args:
        run: The run.

    Returns:
        The figure as PNG, None where there is nothing to draw, and a sentence for each panel that is missing.
    """
    drawings: list[tuple[str, Callable[[Axes], None]]] = []
    missing = []
    for panel in PANELS:
        if any(run.series(extract) for extract in panel.curves.values()):
            drawings.append((panel.title, lambda axes, panel=panel: _draw_panel(axes, run, panel)))  # type: ignore[misc]
        else:
            missing.append(f"{panel.title}: not measured (needs {panel.needs}).")
        if panel.title == "Loss":
            _add_tev(run, drawings, missing)
    lanes = lanes_of(run)
    if not drawings and not lanes:
        return None, missing
    if lanes:
        drawings.append((EVENTS, lambda axes: draw_events(axes, run, lanes)))
    else:
        missing.append("Events: none but starts and checkpoints.")
    heights = [_PANEL_HEIGHT if title != EVENTS else 0.45 + 0.24 * len(lanes) for title, _ in drawings]
    with style.drawing():
        figure = style.new_figure(sum(heights) + 0.3 * len(heights) + 0.4)
        grid = figure.subplots(len(drawings), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, draw) in zip(grid, drawings, strict=True):
            draw(axes)
            axes.set_title(title)
            mark_guard(axes, run)
            style.legend_beside(axes)
        _finish_step_axis(list(grid), run)
        return style.as_png(figure), missing


def _add_tev(run: RunRecord, drawings: list[tuple[str, Callable[[Axes], None]]], missing: list[str]) -> None:
    if run.series(named("tev_mean")):
        drawings.append((TEV_MEAN, lambda axes: _draw_band(axes, run)))
    else:
        missing.append(f"{TEV_MEAN}: not measured (needs tev.every).")
    if len(_quantile_levels(run)) > 0:
        drawings.append((TEV_SPREAD, lambda axes: _draw_quantiles(axes, run)))
    else:
        missing.append(f"{TEV_SPREAD}: not measured (needs tev.every and tev.quantiles).")


def _finish_step_axis(grid: list[Axes], run: RunRecord) -> None:
    recorded = [record["step"] for record in (*run.metrics, *run.rolled_back)]
    last = max([1, *recorded, *(step_of(event, run) for event in run.events)])
    grid[-1].set_xlim(-0.015 * last, 1.02 * last)
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    # The figure is tall: the steps can be read at its upper end too.
    grid[0].tick_params(axis="x", labeltop=len(grid) > 3, labelbottom=len(grid) == 1)


def _rollbacks(run: RunRecord) -> list[list[Record]]:
    """The undone records, one list per rollback: each went its own way over the same steps."""
    by_number: dict[str, list[Record]] = {}
    for record in run.rolled_back:
        by_number.setdefault(str(record.get("rollback")), []).append(record)
    return list(by_number.values())


def _draw_panel(axes: Axes, run: RunRecord, panel: Panel) -> None:
    everything: list[np.ndarray] = []
    has_undone = False
    for index, (name, extract) in enumerate(panel.curves.items()):
        look = style.style(index)
        for undone in _rollbacks(run):
            series = series_of(undone, extract)
            if series:
                style.curve(axes, series.steps, panel.factor * series.values, **style.aside(look))
                everything.append(series.values)
                has_undone = True
        series = run.series(extract)
        if series:
            style.curve(axes, series.steps, panel.factor * series.values, look, name)
            everything.append(series.values)
    if has_undone:
        _name_undone(axes)
    style.choose_scale(axes, panel.factor * np.concatenate(everything), panel.unit, panel.kind)


def _name_undone(axes: Axes) -> None:
    text = style.label("rolled back: not part of the run")
    axes.plot([], [], color=style.ASIDE_COLOR, ls=(0, (1, 1.5)), lw=1.0, label=text)


def _draw_band(axes: Axes, run: RunRecord) -> None:
    mean = run.series(named("tev_mean"))
    spread = run.series(lambda record: number_or_nan(record.get("tev_std")) if "tev_mean" in record else None).values
    low, high = mean.values - spread, mean.values + spread
    if np.isfinite(spread).any():
        axes.fill_between(mean.steps, low, high, color="0.82", lw=0, label=style.label("mean +- standard deviation"))
        if mean.steps.size == 1:
            axes.errorbar(mean.steps, mean.values, spread, color="0.5", capsize=3)
    for undone in _rollbacks(run):
        series = series_of(undone, named("tev_mean"))
        style.curve(axes, series.steps, series.values, **style.aside(style.style(0)))
    style.curve(axes, mean.steps, mean.values, style.style(0), "mean over tokens")
    if run.rolled_back:
        _name_undone(axes)
    style.choose_scale(axes, np.concatenate([low, high]), "TEV\n(unit of the weights)", "linear")


def _quantile_levels(run: RunRecord) -> list[str]:
    found = {key for record in run.metrics for key in _keys(record.get("tev_quantiles"))}
    return sorted((key for key in found if run.series(quantile_named(key))), key=float)


def _keys(value: object) -> list[str]:
    """The keys of a mapping that are numbers."""
    keys = list(value) if isinstance(value, Mapping) else []
    return [key for key in keys if isinstance(key, str) and is_number(_as_float(key))]


def _as_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _draw_quantiles(axes: Axes, run: RunRecord) -> None:
    """Bands between quantiles that lie as far from both ends, the inner ones darker; what has no partner is a line."""
    levels = _quantile_levels(run)
    series = {level: run.series(quantile_named(level)) for level in levels}
    bands = [(low, high) for low, high in zip(levels, reversed(levels), strict=True) if float(low) < float(high)]
    bands = [pair for pair in bands if math.isclose(float(pair[0]) + float(pair[1]), 1.0, abs_tol=1e-9)]
    for index, (low, high) in enumerate(bands):
        shade = f"{0.86 - 0.22 * index / max(1, len(bands) - 1):.2f}" if len(bands) > 1 else "0.8"
        lower, upper = _on_common_steps(series[low], series[high])
        name = f"{float(low):.0%} to {float(high):.0%}"
        axes.fill_between(lower.steps, lower.values, upper.values, color=shade, lw=0, label=style.label(name))
        if lower.steps.size == 1:
            axes.plot([*lower.steps] * 2, [*lower.values, *upper.values], color=shade, lw=6 + 3 * index)
    lines = [level for level in levels if level not in {end for pair in bands for end in pair}]
    for index, level in enumerate(lines):
        name = "median" if float(level) == 0.5 else f"{float(level):.0%}"
        style.curve(axes, series[level].steps, series[level].values, style.style(index), name)
    everything = np.concatenate([found.values for found in series.values()])
    style.choose_scale(axes, everything, "TEV\n(unit of the weights)", "linear")


def _on_common_steps(first: Series, second: Series) -> tuple[Series, Series]:
    steps, left, right = np.intersect1d(first.steps, second.steps, return_indices=True)
    return Series(steps, first.values[left]), Series(steps, second.values[right])


PROFILES = {
    "Gradient norm": ("gradients.layers.gradient_norm", "gradient norm"),
    "Gradient variance": ("gradients.layers.gradient_variance", "gradient variance"),
    "Mean of gradients": ("gradients.layers.gradient_mean", "mean over elements"),
    "Norm of weights": ("gradients.layers.weight_norm", "||weight||"),
    "Size of updates": ("gradients.layers.update_ratio", "||update|| / ||weight||"),
    "Spectral norm of q k": ("gradients.layers.qk_spectral_norm", "largest singular value"),
    "Spectral norm of o v": ("gradients.layers.ov_spectral_norm", "largest singular value"),
    "Residual stream": ("activations.residual_variance", "variance"),
    "Attention entropy": ("activations.attention_entropy", "entropy (nats)"),
    "Attention logits": ("activations.largest_logit", "largest logit"),
    "Saturated rows": ("activations.saturated_share", "share"),
}


def profile_figure(run: RunRecord) -> bytes | None:
    """Draws what was measured per block, at the first, the middle and the last measurement; None without any."""
    found = {title: _profiles(run, dotted) for title, (dotted, _) in PROFILES.items()}
    found = {title: profiles for title, profiles in found.items() if profiles}
    if not found:
        return None
    rows = math.ceil(len(found) / 2)
    with style.drawing():
        figure = style.new_figure(2.1 * rows + 0.3)
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, (title, profiles) in zip(grid, found.items(), strict=False):
            for index, (step, values) in enumerate(profiles):
                # The residual stream is measured at every block's input and after the last block.
                style.curve(axes, np.arange(values.size, dtype=float), values, style.style(index), f"step {step:g}")
            axes.set_title(title)
            kind: Literal["share", "free"] = "share" if title == "Saturated rows" else "free"
            style.choose_scale(axes, np.concatenate([v for _, v in profiles]), PROFILES[title][1], kind)
            axes.set_xlabel("input of block (the last: output)" if title == "Residual stream" else "block")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            style.legend_beside(axes)
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        return style.as_png(figure)


def _profiles(run: RunRecord, dotted: str) -> list[tuple[float, np.ndarray]]:
    found = [(r["step"], values) for r in run.metrics if (values := over_blocks(dotted, r)) is not None]
    found = [(step, values) for step, values in found if np.isfinite(values).any()]
    chosen = sorted({0, len(found) // 2, len(found) - 1}) if found else []
    return [found[index] for index in chosen]


def gradient_and_tev(run: RunRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns steps, TEV and the embedding's gradient variance where both were measured in the same step."""
    rows = [
        (record["step"], record["tev_mean"], variance)
        for record in run.metrics
        if is_number(record.get("tev_mean"))
        and is_number(variance := at(record, "gradients.kinds.embedding.gradient_variance"))
    ]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]
