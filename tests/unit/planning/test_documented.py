"""The tables of docs/planning.md are what the planner chooses."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.robustness import DEVICES, HEADER, PRESETS, row
from mlra_scale.config import load_named_config
from mlra_scale.planning.cluster import named_cluster

DOCUMENT = Path(__file__).parents[3] / "docs" / "planning.md"


def documented(preset: str) -> list[list[str]]:
    """The rows of a preset's table, each a list of cells."""
    text = DOCUMENT.read_text().split("<!-- python -m benchmarks.robustness -->")[1].split("<!-- end -->")[0]
    table = text.split(f"`{preset}`:")[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cluster_has_a_row(preset: str) -> None:
    header, _, *rows = documented(preset)
    assert tuple(header) == HEADER
    assert [(cells[0], int(cells[1])) for cells in rows] == [
        (device, nodes) for device in DEVICES for nodes in PRESETS[preset]
    ]


@pytest.mark.slow_except("gpt2-mlra-72l-1-h100")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("preset", "nodes"), [(preset, number) for preset, numbers in PRESETS.items() for number in numbers]
)
def test_a_row_is_what_the_planner_chooses(preset: str, device: str, nodes: int) -> None:
    config, named = load_named_config(preset, overrides=["parallel.layout=auto"])
    expected = row(config, named, replace(named_cluster(device), nodes=nodes))
    assert list(expected) in documented(preset), expected
