"""`mlra_scale.tev` and `attach_tev` in loops of DeepSpeed and FSDP2, against numpy on the gathered matrix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mlra_scale
from mlra_scale.api.tev import embedding_of
from tests.support.pool import Pools
from tests.unit.stability.test_tev import check, random_matrix

ROWS, WIDTH = 37, 6
"""Odd: pieces of equal size end inside rows, and rows are not spread evenly."""
CPU = {"device": "cpu"}
# Otherwise DeepSpeed compiles an optimizer of its own for offload.
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
ZERO: dict[str, dict[str, Any]] = {
    **{f"zero-{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)},
    **{f"zero-{stage}-bf16": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}} for stage in range(4)},
    **{
        f"zero-{stage}-offload": {"zero_optimization": {"stage": stage, "offload_optimizer": CPU}}
        for stage in (1, 2, 3)
    },
    # The third of DeepSpeed's wrappers, BF16_Optimizer.
    "zero-1-bf16-fp32-sums": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero-3-offload-bf16": {
        "zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
        "bf16": {"enabled": True},
    },
}


class TinyModel(nn.Module):
    """A language model without context, with a head of its own; it returns its loss."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        self.words = nn.Embedding(rows, WIDTH)
        self.head = nn.Linear(WIDTH, rows)
        with torch.no_grad():
            self.words.weight.copy_(torch.from_numpy(random_matrix(rows, WIDTH, mean=0.3)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.words(tokens[:-1])).float(), tokens[1:])


def batch(rank: int, number: int) -> torch.Tensor:
    return torch.randint(ROWS, (50,), generator=torch.Generator().manual_seed(1000 * rank + number))


def masters(engine: Any) -> np.ndarray:
    """The whole embedding by DeepSpeed's own functions: the fp32 weights, or the model's where there are none."""
    from deepspeed.utils import safe_get_full_fp32_param

    weight = engine.module.words.weight
    full = safe_get_full_fp32_param(weight)
    return (weight if full is None else full).detach().double().numpy().reshape(ROWS, WIDTH)


def train_with_deepspeed(rank: int, world_size: int, config: dict[str, Any]) -> Any:
    import deepspeed

    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**DEEPSPEED, **config})
    attached = mlra_scale.attach_tev(engine, every=2)
    matrices = [masters(engine)]
    number = 0

    def step() -> None:
        nonlocal number
        for _ in range(2):
            engine.backward(engine(batch(rank, number)))
            engine.step()
            number += 1

    for _ in range(2):
        step()
    matrices.append(masters(engine))
    now = mlra_scale.tev(engine, extremes=3), mlra_scale.tev(engine, num_tokens=20)
    step()
    attached.detach()
    step()
    assert engine.global_steps == 4
    return attached.history, now, matrices


@pytest.mark.slow_except("zero-2-bf16", "zero-3")
@pytest.mark.parametrize("name", ZERO)
def test_a_deepspeed_engine_of_any_stage(worker_pool: Pools, name: str) -> None:
    results = worker_pool(2).run(train_with_deepspeed, ZERO[name])
    history, (listed, shorter), matrices = results[0]
    assert results[1][:2] == results[0][:2], "ranks disagree"
    assert [step for step, _ in history] == [0, 2]
    assert not np.array_equal(*matrices), "nothing was trained"
    for (_, statistics), matrix in zip(history, matrices, strict=True):
        check(statistics, matrix)
    check(listed, matrices[1], extremes=3)
    check(shorter, matrices[1][:20])


def train_with_monitor(rank: int, world_size: int, folder: str) -> list[tuple[int, Any]]:
    import deepspeed

    model = TinyModel()
    monitor = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    config = {"train_micro_batch_size_per_gpu": 2, **monitor}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attached = mlra_scale.attach_tev(engine, every=1)
    for number in range(2):
        engine.backward(engine(batch(rank, number)))
        engine.step()
    with pytest.raises(ValueError, match="every is -1"):
        mlra_scale.attach_tev(engine, every=-1)
    with pytest.raises(ValueError, match="engine is a TinyModel; give what deepspeed"):
        mlra_scale.attach_tev(model)
    with pytest.raises(ValueError, match="'tokens' names none"):
        mlra_scale.attach_tev(engine, embedding="tokens")
    return attached.history


@pytest.mark.slow
def test_deepspeeds_monitors_get_the_values(worker_pool: Pools, tmp_path: Path) -> None:
    history, *_ = worker_pool(2).run(train_with_monitor, str(tmp_path))
    lines = (tmp_path / "run" / "Train_TEV_tev_mean.csv").read_text().splitlines()
    found = [line.split(",") for line in lines[1:]]
    assert [int(samples) for samples, _ in found] == [0, 4, 8]
    assert [float(value) for _, value in found] == pytest.approx([statistics.mean for _, statistics in history])


def train_with_pipeline(rank: int, world_size: int) -> Any:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")
    words = TinyModel().words
    layers = [words, nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, ROWS)]
    module = PipelineModule(
        layers,
        num_stages=2,
        loss_fn=nn.functional.cross_entropy,
        partition_method="uniform",
        activation_checkpoint_interval=0,
    )
    config = {**DEEPSPEED, "zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    attached = mlra_scale.attach_tev(engine, every=2)
    for step in range(2):
        pairs = [(batch(0, step), batch(1, step)) for _ in range(2)]
        engine.train_batch(iter(pairs))
    weight = embedding_of(engine.module).detach().double().numpy() if rank == 0 else None
    return attached.history, weight


@pytest.mark.slow
def test_the_first_stage_of_a_pipeline_measures(worker_pool: Pools) -> None:
    (history, matrix), (other, _) = worker_pool(2).run(train_with_pipeline)
    assert other == []
    assert [step for step, _ in history] == [0, 2]
    check(history[1][1], matrix)
    assert history[0][1].mean != history[1][1].mean


def train_with_fsdp(rank: int, world_size: int, mesh_shape: tuple[int, ...], rows: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = TinyModel(rows)
    fully_shard(model.words, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = mlra_scale.tev(model)
    for number in range(2):
        model(batch(rank, number) % rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    weight: Any = model.words.weight
    found = mlra_scale.tev(model, extremes=2), mlra_scale.tev(model, num_tokens=rows - 1), mlra_scale.tev(weight)
    return before, found, weight.full_tensor().detach().double().numpy()


@pytest.mark.slow_except("2-rows37")
@pytest.mark.parametrize("rows", [ROWS, 3], ids="rows{}".format)
@pytest.mark.parametrize("mesh", [(2,), (4,), (2, 2)], ids=lambda shape: "x".join(map(str, shape)))
def test_fsdp2(worker_pool: Pools, mesh: tuple[int, ...], rows: int) -> None:
    """Rows that are not spread evenly; with 3 rows on 4 ranks one has none."""
    results = worker_pool(int(np.prod(mesh))).run(train_with_fsdp, mesh, rows)
    before, (listed, shorter, of_weight), matrix = results[0]
    assert all(result[:2] == results[0][:2] for result in results), "ranks disagree"
    check(before, random_matrix(rows, WIDTH, mean=0.3))
    check(listed, matrix, extremes=2)
    check(shorter, matrix[:-1])
    check(of_weight, matrix)
    assert before.mean != listed.mean, "nothing was trained"


def measure_on_a_mesh(rank: int, world_size: int, kind: str) -> Any:
    """The same matrix, cut in one of several ways."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    matrix = torch.from_numpy(random_matrix(ROWS, WIDTH, mean=0.3))
    if kind == "columns":
        mesh = init_device_mesh("cpu", (world_size,))
        with pytest.raises(ValueError, match="a sum that is still to be formed"):
            mlra_scale.tev(DTensor.from_local(matrix, mesh, [Partial()]))
        return mlra_scale.tev(distribute_tensor(matrix, mesh, [Shard(1)]), extremes=2)
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "tensor"))
    if kind == "rows-and-columns":
        return mlra_scale.tev(distribute_tensor(matrix, mesh, [Shard(0), Shard(1)]), extremes=2)
    if kind == "replicated":
        return mlra_scale.tev(distribute_tensor(matrix, mesh, [Replicate(), Replicate()]), extremes=2)
    model = TinyModel()
    parallelize_module(model.words, mesh["tensor"], RowwiseParallel(input_layouts=Replicate()))
    fully_shard(model.words, mesh=mesh["data"])
    return mlra_scale.tev(model, extremes=2)


@pytest.mark.slow_except("columns-2")
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("columns", 2), ("columns", 4), ("rows-and-columns", 4), ("replicated", 4), ("fsdp2-and-tensor-parallel", 4)],
)
def test_any_dtensor(worker_pool: Pools, kind: str, world_size: int) -> None:
    for statistics in worker_pool(world_size).run(measure_on_a_mesh, kind):
        check(statistics, random_matrix(ROWS, WIDTH, mean=0.3), extremes=2)


def measure_in_ddp(rank: int, world_size: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(TinyModel())
    model(batch(rank, 0)).backward()
    return mlra_scale.tev(model)


@pytest.mark.slow
def test_ddp(worker_pool: Pools) -> None:
    for statistics in worker_pool(2).run(measure_in_ddp):
        check(statistics, random_matrix(ROWS, WIDTH, mean=0.3))
