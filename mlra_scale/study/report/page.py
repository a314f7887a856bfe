"""Writes a report: one HTML file from a template in templates/, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from mlra_scale.files import name_errors, write_atomically
from mlra_scale.study.report import wording
from mlra_scale.study.report.records import event_text, number_or_nan, time_text
from mlra_scale.study.report.sweep_record import value_text

HTML = "report.html"
Images = dict[str, bytes | None]
"""PNG files by name; None for a figure with nothing to draw."""
Samples = Mapping[str, Mapping[str, str]]
"""Text that the models wrote: by prompt, then by the name of the run."""

_FILTERS: dict[str, Any] = {
    "base64": lambda png: base64.b64encode(png).decode("ascii"),
    # The header of a PNG file holds its size.
    "png_width": lambda png: int.from_bytes(png[16:20], "big"),
    "png_height": lambda png: int.from_bytes(png[20:24], "big"),
    "finite": number_or_nan,
    **{of.__name__: of for of in (event_text, time_text, value_text)},
    **{of.__name__: of for of in (wording.number, wording.with_error, wording.interval, wording.p_text)},
    **{of.__name__: of for of in (wording.coefficient_text, wording.correlation_verdict)},
}


def write_report(output: Path, template: str, images: Images, **values: Any) -> list[Path]:
    """Writes a page from a template and its variables, which are escaped, and its images, into a folder.

    An image of an earlier report that is None now is removed. Returns the paths of the page and of the images.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlra_scale.study.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _FILTERS
    content = environment.get_template(template).render(**values)
    output.mkdir(parents=True, exist_ok=True)
    for name, png in images.items():
        if png is None:
            (output / name).unlink(missing_ok=True)
        else:
            with name_errors(output / name):
                (output / name).write_bytes(png)
    write_atomically(output / HTML, content)
    return [output / HTML, *(output / name for name, png in images.items() if png is not None)]
