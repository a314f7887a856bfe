"""What all figures share: curves differ by more than colour, legends are beside the data, sizes suit a page."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from mlra_scale.study.report.wording import number

_WIDTH, _DPI = 9.0, 130
"""Width of a figure in inches, and dots per inch."""
_SETTINGS = Path(__file__).with_name("templates") / "report.mplstyle"
Look = dict[str, Any]
"""Keyword arguments of Axes.plot: color, ls, marker, ..."""

# Okabe & Ito's palette, ordered so that neighbours differ in lightness too.
_LOOKS: tuple[Look, ...] = (
    {"color": "#111111", "ls": "-", "marker": "o"},
    {"color": "#d55e00", "ls": (0, (5, 2)), "marker": "s"},
    {"color": "#0072b2", "ls": (0, (1, 1.2)), "marker": "^"},
    {"color": "#009e73", "ls": (0, (5, 1.5, 1, 1.5)), "marker": "D"},
    {"color": "#cc79a7", "ls": (0, (8, 2)), "marker": "v"},
    {"color": "#56b4e9", "ls": (0, (3, 1, 1, 1, 1, 1)), "marker": "P"},
    {"color": "#8a6d00", "ls": "-", "marker": "X"},
    {"color": "#7b3294", "ls": (0, (1, 3)), "marker": "*"},
)
UNDONE: Look = {
    "color": "#777777",
    "ls": (0, (1, 1.5)),
    "lw": 1.0,
    "ms": 3.2,
    "mfc": "white",
    "mew": 0.7,
    "zorder": 1.5,
}
"""Curves of steps that a rollback undid."""


def look(index: int) -> Look:
    """Returns the look of the index-th curve of a figure; looks repeat after eight."""
    return _LOOKS[index % len(_LOOKS)]


@contextmanager
def drawing() -> Iterator[None]:
    """Draws with the settings of this module instead of the user's own."""
    with mpl.rc_context(rc=mpl.rc_params_from_file(_SETTINGS, use_default_template=True)):
        yield


def new_figure(height: float) -> Figure:
    """Returns an empty figure of the page's width; its layout keeps labels and legends apart."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grid_of(settings: Sequence[str], row_height: float, **shared: Any) -> tuple[Figure, list[Axes], list[Axes]]:
    """Returns a figure with a plot for each setting, titled by it if there are several; rows have a height in inches.

    Returns:
        The figure, the plots in the order of the settings, and the leftmost of them.
    """
    columns = min(3 if len(settings) > 4 else 2, len(settings))
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
    """Renders a figure with a palette, which takes a third of the bytes; equal figures give equal files."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def label(text: str, width: int = 26) -> str:
    """Returns text as a label: wrapped, and without matplotlib's markup."""
    shown = "\n".join(textwrap.wrap(text.replace("$", r"\$"), width)) or " "
    return f" {shown}" if shown.startswith("_") else shown


def curve(axes: Axes, steps: Any, values: Any, how: Look, name: str | None = None) -> None:
    """Draws a curve with gaps at nan.

    A marker is at each of up to 40 points, at every n-th of more, and at each point without a neighbour.
    """
    steps, values = np.asarray(steps), np.asarray(values)
    padded = np.concatenate([[False], is_there := np.isfinite(values), [False]])
    is_alone = is_there & ~padded[:-2] & ~padded[2:]
    present = np.flatnonzero(is_there)
    every = 1 if present.size <= 40 else math.ceil(present.size / 12)
    marked = np.union1d(present[::every], np.flatnonzero(is_alone)).tolist()
    axes.plot(steps, values, markevery=marked, label="_" if name is None else label(name), **how)


def choose_scale(axes: Axes, values: Any, unit: str, kind: Literal["free", "linear", "share"] = "free") -> None:
    """Sets the scale of the y axis by the values that are drawn, and its label.

    A free scale is logarithmic if the values are positive and span more than a factor of 20; a share begins at 0.
    """
    finite = np.asarray(values)[np.isfinite(values)]
    if kind == "free" and finite.size > 0 and finite.min() > 0 and finite.max() > 20.0 * finite.min():
        has_few_decades = finite.max() < 1e3 * finite.min()
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if has_few_decades else (1.0,), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda value, _: number(value, 1))
        unit = f"{unit}\n(log scale)"
    else:
        if finite.size > 0 and not 1e-3 <= np.abs(finite).max() < 1e5:
            # A common power of ten above the axis would overlap the title.
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        else:
            axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        if kind == "share":
            axes.set_ylim(0.0, None if finite.max(initial=0.0) > 0 else 1.0)
    axes.set_ylabel(unit)


def legend_beside(axes: Axes) -> None:
    """Puts the legend of a plot to the right of it, if anything has a name."""
    if handles := axes.get_legend_handles_labels()[0]:
        beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.03), "borderaxespad": 0.0}
        axes.legend(handles=handles, handlelength=3.2, alignment="left", **beside)


def figure_legend(figure: Figure, handles: Sequence[Line2D], **more: Any) -> None:
    """Puts one legend to the right of all plots."""
    figure.legend(handles=handles, loc="outside right upper", alignment="left", **more)


def handle(name: str, **how: Any) -> Line2D:
    """Returns the entry of a curve in a legend."""
    return Line2D([], [], label=name, **how)


def variant_handles(variants: Sequence[str]) -> list[Line2D]:
    """Returns the entries of all variants."""
    return [handle(label(variant), **look(index)) for index, variant in enumerate(variants)]
