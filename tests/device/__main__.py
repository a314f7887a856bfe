"""Traces layouts on a GPU that is not there, and says what was found.

python -m tests.device                     the names of the layouts
python -m tests.device "ZeRO 3 x data 8"   everything that is known of one, or of all whose name contains this text
python -m tests.device NAME layers=4 ...   the same with other values of the layout (`changed`) or configuration
python -m tests.device --write             traces all layouts, and writes the tables of docs/device.md
"""

from __future__ import annotations

import pprint
import sys
from dataclasses import replace

from tests.support.device import checks, document, fake_cuda
from tests.support.device.layouts import ALL, MEASURING, Layout
from tests.support.device.running import trace


def changed(layout: Layout, overrides: list[str]) -> Layout:
    """The layout with other values; `layers=`, `micro_batches=`, `world_size=`, `rank=`, `ds_config=` are its own."""
    own = {"layers": "num_layers", "micro_batches": "num_micro_batches", "world_size": "world_size", "rank": "rank"}
    for override in overrides:
        name, value = override.split("=", 1)
        if name in own:
            layout = replace(layout, **{own[name]: int(value)})  # type: ignore[arg-type]
        elif name == "ds_config":
            layout = replace(layout, ds_config=value or None)
        else:
            layout = replace(layout, overrides=(*layout.overrides, override))
    return layout


def write() -> None:
    """Writes the tables of docs/device.md."""
    reports = [trace(layout) for layout in ALL]
    document.write("layouts", document.layouts_table(reports))
    document.write("matrices", document.matrices_table(reports))
    document.write("waits", document.waits_table())
    document.write("flow control", document.flow_control_table())
    document.write("measured waits", document.measured_table())


def main(arguments: list[str]) -> int:
    """The command line."""
    if not arguments:
        print("\n".join(layout.name for layout in (*ALL, *MEASURING)))
        return 0
    if (reason := fake_cuda.missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    if arguments == ["--write"]:
        write()
        return 0
    name, *overrides = arguments
    for layout in (layout for layout in (*ALL, *MEASURING) if name in layout.name):
        report = trace(changed(layout, overrides))
        print(document.layouts_table([report]), document.matrices_table([report]), *checks.problems(report), sep="\n")
        pprint.pprint(report, width=160, compact=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
