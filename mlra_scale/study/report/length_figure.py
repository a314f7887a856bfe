"""The figure of the lengths of documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.files import write_atomically
from mlra_scale.study.report import style

_BINS_PER_OCTAVE = 4


@style.drawing()
def draw_lengths(path: Path, lengths: Mapping[str, Mapping[str, NDArray[np.int32]]]) -> Path:
    """Draws how many documents have which length, and how many of the tokens are in documents up to a length.

    Args:
        path: The .png file to write.
        lengths: Of each data set, of each of its splits: the lengths of the documents in tokens.

    Returns:
        The file.
    """
    figure = style.new_figure(3.4)
    histogram, cumulative = figure.subplots(1, 2)
    joined = {name: np.concatenate(list(splits.values())) for name, splits in lengths.items()}
    octaves = np.ceil(np.log2(max(int(values.max()) for values in joined.values()) + 1))
    edges = 2.0 ** (np.arange(octaves * _BINS_PER_OCTAVE + 1) / _BINS_PER_OCTAVE)
    for index, (name, values) in enumerate(joined.items()):
        how = {key: value for key, value in style.look(index).items() if key != "marker"}
        counts, _ = np.histogram(values, edges)
        histogram.stairs(100.0 * counts / len(values), edges, label=style.label(name), lw=1.4, **how)
        tokens, _ = np.histogram(values, edges, weights=values.astype(np.float64))
        cumulative.plot(edges[1:], 100.0 * np.cumsum(tokens) / tokens.sum(), **how)
    for axes, title in (
        (histogram, "documents per quarter octave, in %"),
        (cumulative, "tokens in documents up to a length, in %"),
    ):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.tick_params(axis="x", rotation=45)
        axes.set_xlabel("tokens per document")
        axes.set_title(title)
        axes.set_ylim(0.0)
    handles = [
        style.handle(style.label(name), **{k: v for k, v in style.look(index).items() if k != "marker"})
        for index, name in enumerate(joined)
    ]
    style.figure_legend(figure, handles)
    write_atomically(path, style.as_png(figure))
    return path
