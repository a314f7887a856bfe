"""The layouts that are traced: one rank of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

MEASURED = (
    "tev.every=1",
    "gradients.every=1",
    "gradients.noise_every=1",
    "gradients.spectral_iterations=4",
    "activations.every=1",
    "qk_clip.threshold=100",
    "qk_clip.samples=4",
)
"""Overrides that turn every measurement on."""
PLANS = ("replicated", "merged")


@dataclass(frozen=True)
class Layout:
    """What one subprocess traces."""

    name: str  # of the layout
    overrides: tuple[str, ...] = ()  # of the configuration, as on the command line
    world_size: int = 1  # number of ranks
    rank: int = 0  # the rank that is traced
    ds_config: str | None = None  # DeepSpeed's configuration: a file of ds_configs/, or none
    preset: str = "gpt2-mlra-72l"  # the preset
    num_layers: int = 8  # blocks of the whole model
    num_micro_batches: int = 6  # of a step, on every data rank
    with_measurements: bool = False  # whether TEV, statistics, QK-clip, snapshot and evaluation are traced too


PARALLEL = ("parallel.tensor=2", "parallel.pipeline=4")
PIPELINE = Layout("tensor 2 x pipeline 4 x data 4", PARALLEL, world_size=32, ds_config="ds_configs/zero1_pipeline.json")
"""Two blocks to a stage; ranks 0, 8, 16 and 24 are the first of theirs."""
ZERO = Layout("ZeRO", world_size=8, num_layers=4, num_micro_batches=3)
TENSOR = Layout(
    "tensor 2",
    ("parallel.tensor=2",),
    world_size=8,
    ds_config="ds_configs/zero1.json",
    num_layers=4,
    num_micro_batches=3,
)
"""What the model's options are traced on: the collectives of tensor parallelism are there, and the last block's end."""


def _stages(layout: Layout, *stages: int) -> tuple[Layout, ...]:
    """First ranks of pipeline stages."""
    return tuple(replace(layout, name=f"{layout.name}, stage {stage}", rank=8 * stage) for stage in stages)


def _with(layout: Layout, name: str, *overrides: str, **changes: Any) -> Layout:
    """A layout with something else."""
    return replace(layout, name=name, overrides=(*layout.overrides, *overrides), **changes)


def _zero(stage: int, name: str = "", *overrides: str, **changes: Any) -> Layout:
    ds_config = f"ds_configs/zero{stage}.json" if stage else None
    return _with(ZERO, name or f"ZeRO {stage} x data 8", *overrides, **{"ds_config": ds_config, **changes})


SEQUENCE = _with(PIPELINE, f"{PIPELINE.name}, sequence parallel", "parallel.sequence_parallel=true")
DROPOUT = tuple(f"model.{site}_dropout=0.1" for site in ("embedding", "attention", "residual"))
OPTIONS = (
    "model.qk_norm=true",
    "model.layer_norm_scaling=true",
    "model.embedding_scale=sqrt_width",
    "model.z_loss=1e-4",
)
WITH_PIPELINE: tuple[Layout, ...] = (
    *_stages(PIPELINE, 0, 1, 3),
    *_stages(SEQUENCE, 0, 1, 3),
    *_stages(_with(PIPELINE, f"{PIPELINE.name}, masked", "data.document_attention=masked"), 0, 1, 3),
    _zero(1, "one rank, pipeline engine", "parallel.engine=pipeline", world_size=1),
)
WITHOUT_PIPELINE: tuple[Layout, ...] = (
    _zero(0),
    _zero(1),
    _zero(2),
    _zero(3),
    _zero(3, "ZeRO 3, masked", "data.document_attention=masked"),
    _zero(3, "ZeRO 3 x tensor 2 x data 4", "parallel.tensor=2"),
    _zero(3, "ZeRO 3, offload x data 8", ds_config="ds_configs/zero3_offload.json"),
    _zero(1, "several head chunks", "train.micro_batch_size=12"),
    _zero(1, "masked", "data.document_attention=masked"),
    _zero(1, "block checkpointing", "parallel.activation_checkpointing=block"),
    _zero(1, "selective checkpointing", "parallel.activation_checkpointing=selective"),
    _zero(2, "fp16, ZeRO 2", "train.precision=fp16"),
    _with(TENSOR, "tensor 2, dropout", *DROPOUT),
    _with(TENSOR, "tensor 2, options", *OPTIONS),
    _with(TENSOR, "tensor 2, sigmaReparam", "model.sigma_reparam=true"),
    _with(TENSOR, "tensor 2, CompleteP", "model.depth_rule=completep"),
    _with(TENSOR, "tensor 2, factorised o", "model.factorised_projections=[q,k,v,o]"),
    _with(TENSOR, "tensor 2, dense", preset="gpt2-72l"),
    *(_with(TENSOR, f"tensor 2, plan {plan}", f"parallel.low_rank_plan={plan}") for plan in PLANS),
    *(
        _with(layout, f"{name}, {layout.name}", f"optim.name={name}")
        for name in ("muon", "spectron")
        for layout in (_zero(1), _zero(3), TENSOR)
    ),
)
ALL = (*WITH_PIPELINE, *WITHOUT_PIPELINE)
LAYOUTS = {layout.name: layout for layout in ALL}
DEEP = (*_stages(PIPELINE, 0, 1, 3), LAYOUTS["ZeRO 1 x data 8"])
"""Those that are traced with 72 layers too."""
MEASURING = tuple(
    _with(layout, f"{layout.name}, measured", *MEASURED, with_measurements=True, num_micro_batches=micro_batches)
    for layout, micro_batches in (
        (replace(TENSOR, num_layers=2, rank=1), 2),
        (_stages(replace(PIPELINE, num_layers=4), 3)[0], 4),
        (replace(LAYOUTS["ZeRO 3 x tensor 2 x data 4"], num_layers=2), 2),
    )
)
"""Everything that is measured and saved."""
