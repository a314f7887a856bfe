"""The process mesh: which rank holds which tensor shard, pipeline stage and data shard.

Tensor-parallel ranks are innermost, pipeline stages outermost:
rank = (stage * data + data_rank) * tensor + tensor_rank.
This is the only file that touches Megatron-core's global parallel state.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from mlra_scale.config import BatchPlan
from mlra_scale.megatron import parallel_state
from mlra_scale.parallel.network import set_gloo_interface


@dataclass(frozen=True)
class Topology:
    """Degrees, coordinates and process groups of this rank. The world group is the default group."""

    world_size: int
    rank: int
    tensor: int
    pipeline: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    tensor_group: dist.ProcessGroup  # ranks that share this rank's stage and data shard
    pipeline_group: dist.ProcessGroup  # ranks that share this rank's tensor and data coordinates
    data_group: dist.ProcessGroup  # ranks that hold the same weights
    stage_group: dist.ProcessGroup  # ranks of this rank's pipeline stage: data_rank * tensor + tensor_rank in it
    # All ranks, over gloo whatever the device: for small objects about checkpoints, from the main thread only, so that
    # no collective of training can meet one of theirs.
    control_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1


def initialize_distributed(device: str, timeout_minutes: float) -> torch.device:
    """Starts the default process group from the launcher's environment, unless it is running.

    Args:
        device: `cpu` (gloo) or `cuda` (nccl).
        timeout_minutes: How long a collective may wait for its peers.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
            os.environ.setdefault(name, value)
        set_gloo_interface(os.environ)
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(minutes=timeout_minutes))
    # DeepSpeed would test which of its kernels it can build, warn on every rank of seven that need nvcc, and compile an
    # all-reduce in shared memory for inference on CPUs; training calls none of them.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed adopts the running process group and keeps its own handle on it.
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, timeout=timedelta(minutes=timeout_minutes)
    )
    # DeepSpeed's own groups (pipeline grid, tied weights) would wait for torch's default, up to half an hour.
    deepspeed.comm.comm.cdb.new_group = lambda ranks: dist.new_group(ranks, timeout=timedelta(minutes=timeout_minutes))
    return torch.device("cpu") if device == "cpu" else torch.device("cuda", local_rank)


def build_topology(plan: BatchPlan, device: torch.device, timeout_minutes: float) -> Topology:
    """Creates the process groups of a layout, with a timeout for their collectives; every rank calls it."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tensor,
        pipeline_model_parallel_size=plan.pipeline,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,  # the second set of groups that Megatron keeps for CPU tensors
    )
    topology = Topology(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=plan.tensor,
        pipeline=plan.pipeline,
        data=plan.data,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        stage_group=parallel_state.get_tensor_and_data_parallel_group(),
        control_group=dist.new_group(timeout=timedelta(minutes=timeout_minutes), backend="gloo"),
        device=device,
    )
    expected = (topology.pipeline_rank * topology.data + topology.data_rank) * topology.tensor + topology.tensor_rank
    assert topology.rank == expected, (topology.rank, expected)
    in_stage = dist.get_process_group_ranks(topology.stage_group)
    assert in_stage.index(topology.rank) == topology.data_rank * topology.tensor + topology.tensor_rank, in_stage
    return topology


def destroy_topology(topology: Topology) -> None:
    """Destroys the groups of a layout, so that another one can be built in the same process; collective."""
    dist.destroy_process_group(topology.control_group)
    parallel_state.destroy_model_parallel()
