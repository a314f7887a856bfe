"""What all figures share: no colour carries meaning alone, legends stand beside the data, sizes suit a page."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from mlra_scale.study.verdicts import number

WIDTH = 9.0
"""Of a figure, in inches."""
DPI = 130
_MANY_POINTS = 40
_LOG_FROM = 20.0
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Style:
    """How one curve looks: by colour, and without it by line and marker."""

    color: str
    line: Any
    marker: str


# Okabe & Ito's palette, ordered so that neighbours differ in lightness too.
_STYLES = (
    Style("#111111", "-", "o"),
    Style("#d55e00", (0, (5, 2)), "s"),
    Style("#0072b2", (0, (1, 1.2)), "^"),
    Style("#009e73", (0, (5, 1.5, 1, 1.5)), "D"),
    Style("#cc79a7", (0, (8, 2)), "v"),
    Style("#56b4e9", (0, (3, 1, 1, 1, 1, 1)), "P"),
    Style("#8a6d00", "-", "X"),
)
ASIDE_COLOR = "#777777"


def style(index: int) -> Style:
    """Returns the look of the index-th curve of a figure; they repeat after seven."""
    return _STYLES[index % len(_STYLES)]


@contextmanager
def drawing() -> Iterator[None]:
    """The settings that all figures are made under, the user's own left out."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def new_figure(height: float) -> Figure:
    """Returns an empty figure of the page's width that keeps labels and legends apart by itself."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grid_of(settings: Sequence[str], row_height: float, **shared: Any) -> tuple[Figure, list[Axes], list[Axes]]:
    """Returns a figure with a plot for each setting, titled by it where there are several.

    Args:
        settings: The places on a sweep's axes.
        row_height: Of a row of plots, in inches; a single column is a little higher.
        **shared: sharex, sharey.

    Returns:
        The figure, the plots in the order of the settings, and those of them that stand leftmost.
    """
    columns = min(3, len(settings)) if len(settings) > 4 else min(2, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure = new_figure(0.6 + (row_height + (0.6 if columns == 1 else 0.0)) * rows)
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    plots = list(grid.ravel())
    for axes, setting in zip(plots, settings, strict=False):
        axes.set_title(label(setting, 60) if len(settings) > 1 else "")
    for axes in plots[len(settings) :]:
        axes.set_visible(False)
    return figure, plots[: len(settings)], list(grid[:, 0])


def as_png(figure: Figure) -> bytes:
    """Renders a figure: with a palette, a third of the size, and without a date or version, always the same file."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def label(text: str, width: int = 26) -> str:
    """Returns text as a label: wrapped, and with nothing in it that matplotlib reads as an instruction."""
    shown = "\n".join(textwrap.wrap(text.replace("$", r"\$"), width)) or " "
    return f" {shown}" if shown.startswith("_") else shown


def curve(
    axes: Axes,
    steps: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    look: Style,
    name: str | None = None,
    **more: Any,
) -> None:
    """Draws a curve with gaps where a value is nan.

    There is a marker at each of few points, at some of many, and at each that stands alone: no line would show it.
    """
    is_there = np.isfinite(values)
    padded = np.concatenate([[False], is_there, [False]])
    is_alone = is_there & ~padded[:-2] & ~padded[2:]
    present = np.flatnonzero(is_there)
    every = 1 if present.size <= _MANY_POINTS else math.ceil(present.size / 12)
    marked = [int(index) for index in np.union1d(present[::every], np.flatnonzero(is_alone))]
    shown = "_" if name is None else label(name)
    axes.plot(steps, values, color=look.color, ls=look.line, marker=look.marker, markevery=marked, label=shown, **more)


def aside(look: Style) -> dict[str, Any]:
    """Returns how a curve looks of what is not part of the run any more: grey, its own marker hollow."""
    grey = Style(ASIDE_COLOR, (0, (1, 1.5)), look.marker)
    return {"look": grey, "lw": 1.0, "ms": 3.2, "mfc": "white", "mew": 0.7, "zorder": 1.5}


def choose_scale(
    axes: Axes, values: npt.NDArray[np.float64], unit: str, kind: Literal["free", "linear", "share"] = "free"
) -> None:
    """Sets the y axis and names its unit, and the scale where that is logarithmic.

    Args:
        axes: Where the values are drawn.
        values: All of them.
        unit: The axis's label.
        kind: free: logarithmic where the values are positive and span more than a factor of 20; linear: never; share:
            linear from 0 on.
    """
    finite = values[np.isfinite(values)]
    if kind == "free" and finite.size > 0 and finite.min() > 0 and finite.max() > _LOG_FROM * finite.min():
        has_few_decades = finite.max() < 1e3 * finite.min()
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if has_few_decades else (1.0,), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda value, _: number(value, 1))
        unit = f"{unit}\n(log scale)"
    else:
        if finite.size > 0 and not 1e-3 <= np.abs(finite).max() < 1e5:
            # A common power of ten above the axis would run into the title.
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        else:
            axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        if kind == "share":
            axes.set_ylim(0.0, None if finite.max(initial=0.0) > 0 else 1.0)
    axes.set_ylabel(unit)


def legend_beside(axes: Axes, handles: list[Any] | None = None, title: str | None = None) -> None:
    """Puts the legend to the right of the data; none where nothing has a name."""
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.03),
            borderaxespad=0.0,
            handlelength=3.2,
            title=title,
            alignment="left",
        )


def handle(look: Style, name: str, **more: Any) -> Line2D:
    """Returns a legend's entry of a curve."""
    shown = {"color": look.color, "ls": look.line, "marker": look.marker} | more
    return Line2D([], [], label=label(name), **shown)
