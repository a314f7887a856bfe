"""The layouts that are traced: one rank of each."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Layout:
    """What one subprocess traces.

    Attributes:
        name: Of the layout.
        overrides: Of the configuration, as on the command line.
        world_size: Number of ranks.
        rank: The rank that is traced.
        ds_config: DeepSpeed's configuration: a file of ds_configs/, or none.
        preset: The preset.
        num_layers: Blocks of the whole model.
        num_micro_batches: Of a step, on every data rank.
        with_measurements: Whether TEV, statistics, QK-clip, snapshot, save, evaluation and generation are traced too.
    """

    name: str
    overrides: tuple[str, ...] = ()
    world_size: int = 1
    rank: int = 0
    ds_config: str | None = None
    preset: str = "gpt2-mlra-72l"
    num_layers: int = 8
    num_micro_batches: int = 6
    with_measurements: bool = False


PIPELINE = Layout(
    "tensor 2 x pipeline 4 x data 4",
    ("parallel.tensor=2", "parallel.pipeline=4"),
    world_size=32,
    ds_config="ds_configs/zero1_pipeline.json",
)
"""Two blocks to a stage; ranks 0, 8, 16 and 24 are the first of theirs."""


def _stage(layout: Layout, stage: int, rank: int) -> Layout:
    return replace(layout, name=f"{layout.name}, stage {stage}", rank=rank)


def _zero(stage: int, *overrides: str, name: str = "", world_size: int = 8, **more: object) -> Layout:
    ds_config = f"ds_configs/zero{stage}.json" if stage else None
    return Layout(name or f"ZeRO {stage} x data {world_size}", overrides, world_size, 0, ds_config, **more)  # type: ignore[arg-type]


ALL: tuple[Layout, ...] = (
    _stage(PIPELINE, 0, 0),
    _stage(PIPELINE, 1, 8),
    _stage(PIPELINE, 3, 24),
    _zero(0),
    _zero(1),
    _zero(2),
    _zero(3),
    _zero(3, "parallel.tensor=2", name="ZeRO 3 x tensor 2 x data 4"),
)
LAYOUTS = {layout.name: layout for layout in ALL}
