"""The picture of a plan: memory of a rank by component, and the estimated time of a step by what it is spent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlra_scale.study.report import style

GIB = 2**30
MEMORY = ("weights", "gradients", "master", "moments", "activations", "logits", "temporary")
"""Components of `memory_bytes`."""
_STAGE = {
    "compute": "matrix products, attention",
    "elementwise": "element by element",
    "tensor": "tensor-parallel messages",
    "pipeline": "pipeline messages",
    "data": "data-parallel messages",
    "overhead": "launching",
}
"""Fields of a stage's seconds, and their names in the picture."""
_LEGEND = (
    "layouts: degrees of tensor (t), pipeline (p) and data parallelism (d); micro-batch x accumulation; *: the choice"
)
_HATCHES = ("", "//", "..", "\\\\", "xx", "++", "--", "oo", "**")
_Place = Literal["outside lower left", "outside lower right"]


def time_parts(layout: Mapping[str, Any]) -> dict[str, float]:
    """Returns the seconds of a step by what they are spent on; their sum is `step_seconds`.

    What every micro-batch needs is that of the slowest stage, which all wait for; the bubble is the time in which that
    stage waits for the others (planning/step_time.py has the formula).

    Args:
        layout: A layout as `mlra-scale plan --json` writes it.
    """
    totals = [sum(stage.values()) for stage in layout["stage_seconds"]]
    slowest = layout["stage_seconds"][totals.index(max(totals))]
    parts = {name: layout["accumulation_steps"] * slowest[field] for field, name in _STAGE.items()}
    parts["pipeline bubble"] = sum(totals) - max(totals)
    parts["reduction of gradients"] = layout["reduction_seconds"]
    parts["update"] = layout["update_seconds"]
    parts["launching"] += layout["step_seconds"] - sum(parts.values())  # what a step needs once
    return parts


@style.drawing()
def plan_figure(layouts: Sequence[tuple[str, Mapping[str, Any]]], usable_memory: float, title: str) -> bytes:
    """Draws two bars for each layout, cut into their parts, as PNG.

    Args:
        layouts: Number and values of each layout, as `mlra-scale plan --json` writes them; at least one.
        usable_memory: Bytes of a device; a line.
        title: Of what model and cluster.
    """
    names = [f"{number}  {_name(layout)}" for number, layout in layouts]
    figure = style.new_figure(2.7 + 0.42 * len(layouts))
    figure.suptitle(f"{title}\n{_LEGEND}", fontsize="medium")
    memory, time = figure.subplots(1, 2, sharey=True)
    sizes = [{name: layout["memory_bytes"][name] / GIB for name in MEMORY} for _, layout in layouts]
    _draw_bars(memory, names, sizes)
    memory.axvline(usable_memory / GIB, color="#111111", lw=1.2, ls="--", label="usable")
    _finish(figure, memory, "Memory of a rank of the largest stage", "GiB", "outside lower left")
    _draw_bars(time, names, [time_parts(layout) for _, layout in layouts])
    _finish(figure, time, "Time of a step, estimated", "s", "outside lower right")
    memory.invert_yaxis()  # the first layout is at the top; both plots share the axis
    return style.as_png(figure)


def _name(layout: Mapping[str, Any]) -> str:
    mesh = f"t{layout['tensor']} p{layout['pipeline']} d{layout['data']}, ZeRO {layout['zero_stage']}"
    recomputed = layout["activation_checkpointing"]
    more = "" if recomputed == "none" else f", recompute {recomputed}"
    return f"{mesh}\n{layout['micro_batch_size']} x {layout['accumulation_steps']}{more}"


def _draw_bars(axes: Axes, names: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    """Draws a row of parts for each layout; a part that can be seen nowhere is left out."""
    longest = max(sum(row.values()) for row in rows)
    shown = [part for part in rows[0] if max(row[part] for row in rows) > 1e-3 * longest]
    begins = [0.0] * len(rows)
    for index, part in enumerate(shown):
        widths = [row[part] for row in rows]
        color, hatch = style.look(index + 1)["color"], _HATCHES[index]
        axes.barh(
            range(len(rows)), widths, left=begins, label=part, color=color, hatch=hatch, edgecolor="white", lw=0.4
        )
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    axes.grid(axis="y", visible=False)


def _finish(figure: Figure, axes: Axes, title: str, unit: str, place: _Place) -> None:
    axes.set_title(title)
    axes.set_xlabel(unit)
    figure.legend(*axes.get_legend_handles_labels(), loc=place, ncols=2, handlelength=2.0)
