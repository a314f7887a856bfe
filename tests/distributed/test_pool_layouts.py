"""Layouts of Megatron-core groups and DeepSpeed engines can follow each other in the same processes."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import steps
from tests.support.layouts import Layout, canonical_weights, layout_config
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]
HIDDEN, BATCH = 8, 8

# tensor, pipeline, ZeRO stage; data parallelism takes the rest of the ranks
LAYOUTS = [(1, 1, 0), (2, 2, 1), (2, 1, 3), (1, 2, 0), (4, 1, 1), (1, 4, 1), (1, 1, 2)]


class MegatronAsMpu:
    """What DeepSpeed asks of a model-parallel unit, answered by Megatron's global groups."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.get_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = parallel_state.get_tensor_model_parallel_group
        self.get_data_parallel_rank = parallel_state.get_data_parallel_rank
        self.get_data_parallel_world_size = parallel_state.get_data_parallel_world_size
        self.get_data_parallel_group = parallel_state.get_data_parallel_group


def make_layers() -> list[Any]:
    import torch
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ModelParallelConfig(use_cpu_initialization=True, gradient_accumulation_fusion=False)
            common: dict[str, Any] = {"config": config, "init_method": torch.nn.init.xavier_normal_, "bias": True}
            self.column = ColumnParallelLinear(HIDDEN, 4 * HIDDEN, gather_output=False, **common)
            self.row = RowParallelLinear(4 * HIDDEN, HIDDEN, input_is_parallel=True, skip_bias_add=False, **common)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.row(torch.tanh(self.column(x)[0]))[0]

    layers = []
    for i in range(4):
        torch.manual_seed(i)
        layers.append(Pair())
    return layers


def squared_error(output: Any, target: Any) -> Any:
    return ((output - target) ** 2).mean()


def train(rank: int, world_size: int, tensor: int, pipeline: int, stage: int) -> tuple[list[float], int, int]:
    """Losses of two steps, and how many file descriptors and tensors the process holds before they begin."""
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron.core import parallel_state

    descriptors = len(os.listdir("/proc/self/fd"))
    tensors = sum(torch.is_tensor(thing) for thing in gc.get_objects())
    parallel_state.initialize_model_parallel(tensor, pipeline)
    data = world_size // tensor // pipeline
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // data,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # on by default, and a pipeline at stage 0 clips by the norm of each stage alone
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
    }
    deepspeed.init_distributed(dist_backend="gloo")
    mpu: Any = None
    if pipeline > 1:
        topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
        module: Any = PipelineModule(
            make_layers(), topology=topology, loss_fn=squared_error, partition_method="uniform"
        )
    elif stage == 3:
        mpu = MegatronAsMpu()
        group = mpu.get_data_parallel_group()
        with deepspeed.zero.Init(mpu=mpu, data_parallel_group=group, config_dict_or_path=config):
            module = torch.nn.Sequential(*make_layers())
    else:
        mpu = MegatronAsMpu()
        module = torch.nn.Sequential(*make_layers())
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=mpu)
    losses = []
    data_rank = parallel_state.get_data_parallel_rank()
    mine = slice(data_rank * BATCH // data, (data_rank + 1) * BATCH // data)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(2, BATCH, HIDDEN, generator=generator)[:, mine]
        if pipeline > 1:
            losses.append(float(engine.train_batch(iter([(x, target)]))))
        else:
            loss = squared_error(engine(x), target)
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean, group=mpu.get_data_parallel_group())
            losses.append(float(mean) / data)
    return losses, descriptors, tensors


@pytest.mark.slow
def test_layouts_follow_each_other_and_leave_nothing_behind(worker_pool: Pools) -> None:
    pool = worker_pool(4)
    expected = worker_pool(1).run(train, 1, 1, 0)[0][0]
    assert expected[1] < expected[0]
    pids = None
    held = []
    for _ in range(2):
        for layout in LAYOUTS:
            results = pool.run(train, *layout)
            for losses, _, _ in results:
                assert losses == pytest.approx(expected, rel=1e-6), layout
            held.append([result[1:] for result in results])
            pids = pids or pool.pids
    assert pool.pids == pids
    print("descriptors and tensors before each case, rank 0:", [rank_0 for rank_0, *_ in held])
    first, second = held[: len(LAYOUTS)], held[len(LAYOUTS) :]
    for rank in range(4):
        descriptors = [max(case[rank][0] for case in cases) for cases in (first, second)]
        tensors = max(case[rank][1] for case in second)
        # One leaked engine would add more than this to every later case.
        assert descriptors[1] <= descriptors[0] + 4 and tensors < 30, (rank, descriptors, tensors)


def threads_of_groups(rank: int, world_size: int) -> int:
    """Threads that gloo runs for the process groups of this process."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith(("gloo", "pt_gloo")) for name in names)


@pytest.mark.parametrize("layout", [Layout(stage=3), Layout(engine="pipeline")], ids=str)
def test_process_groups_end_with_their_case(worker_pool: Pools, layout: Layout) -> None:
    """Each has threads that wake up a hundred times a second: groups of old cases would slow down all that follow."""
    pool, config = worker_pool(1), layout_config(layout)
    found = []
    for _ in range(4):
        pool.run(steps.train, config, 1, canonical_weights(config.model))
        found += pool.run(threads_of_groups)
    # The groups of one engine have twelve; one group may take a moment longer to end.
    assert max(found) - min(found) < 12, found


def linear_map(rank: int, world_size: int) -> str:
    """Where torch's linear map comes from in this process."""
    import torch

    return str(torch.nn.functional.linear.__module__)


def test_what_zero_3_replaces_in_torch_is_put_back(worker_pool: Pools) -> None:
    """A layout whose turn comes later would otherwise round as ZeRO 3 does, and not as it does alone."""
    pool, config = worker_pool(1), layout_config(Layout(stage=3))
    pool.run(steps.train, config, 1, canonical_weights(config.model))
    assert "deepspeed" not in pool.run(linear_map)[0]
