"""Writing a report: one HTML file and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.files import write_atomically

HTML = "report.html"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        html: The report.
        images: The figures beside it.
    """

    html: Path
    images: tuple[Path, ...]


def write_report(output: Path, content: str, images: Mapping[str, bytes | None]) -> Written:
    """Writes the report and its images; an image that an earlier report had and this one has not is removed.

    Args:
        output: The folder; made if need be.
        content: The HTML document.
        images: By file name; None for a figure that there is nothing to draw in.

    Returns:
        The paths.
    """
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, png in images.items():
        path = output / name
        if png is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(png)
            paths.append(path)
    write_atomically(output / HTML, content)
    return Written(output / HTML, tuple(paths))
