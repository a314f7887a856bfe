"""The other ranks, which are not there: a process group of any size, and what they would have sent.

Collectives leave tensors as they are: every rank's values count as the same. What a pipeline's neighbour says of its
messages (shapes, partitions) is made here, so that DeepSpeed's own code reads it, and waits for it, as on a GPU.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import TENSOR_META_SIZE, PipelineEngine
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from mlra_scale.config import BatchPlan, Config

BACKENDS: dict[str, str] = {}
"""The backend that the code asked for, by name of group; one that is not here has the default's: nccl."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def install(rank: int, world_size: int) -> Counter[int]:
    """Starts the fake process group of a world.

    Returns:
        The number of groups that are created from now on, by their number of ranks.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    create = dist.new_group
    created: Counter[int] = Counter()

    def new_group(ranks: Any = None, *arguments: Any, backend: str | None = None, **options: Any) -> Any:
        options.pop("device_id", None)
        group = create(ranks, *arguments, **options)
        created[world_size if ranks is None else len(ranks)] += 1
        if backend is not None and isinstance(group, dist.ProcessGroup):
            BACKENDS[group.group_name] = backend
        return group

    def get_backend(group: Any = None) -> str:
        return "nccl" if group is None else BACKENDS.get(group.group_name, "nccl")

    for module in (dist, distributed_c10d):
        module.new_group = new_group  # type: ignore[attr-defined]
        module.get_backend = get_backend  # type: ignore[attr-defined]
    distributed_c10d.is_nccl_available = lambda: True
    return created


def exchange_objects(sends: Callable[[str, Any, int], None]) -> None:
    """Has collectives of Python objects answer as if every rank had sent what this one sends.

    Args:
        sends: Is given the collective, its group, and the bytes that this rank sends.
    """

    def all_gather_object(gathered: list[Any], mine: Any, group: Any = None) -> None:
        sends("all_gather_object", group, len(pickle.dumps(mine)))
        gathered[:] = [mine] * len(gathered)

    def gather_object(mine: Any, gathered: list[Any] | None = None, dst: int = 0, group: Any = None) -> None:
        sends("gather_object", group, len(pickle.dumps(mine)))
        if gathered is not None:
            gathered[:] = [mine] * len(gathered)

    def broadcast_object_list(values: list[Any], src: int = 0, group: Any = None) -> None:
        sends("broadcast_object_list", group, len(pickle.dumps(values)))

    for collective in (all_gather_object, gather_object, broadcast_object_list):
        setattr(dist, collective.__name__, collective)


def group_names(topology: Any) -> Callable[[dist.ProcessGroup], str]:
    """Returns what names a process group: world, control, tensor, data, pipeline, ends (of the pipeline), or other."""
    by_ranks = {
        tuple(dist.get_process_group_ranks(group)): name
        for name, group in (
            ("pipeline", topology.pipeline_group),
            ("data", topology.data_group),
            ("tensor", topology.tensor_group),
        )
    }
    stages = dist.get_process_group_ranks(topology.pipeline_group)
    if len(stages) > 2:
        by_ranks[(stages[0], stages[-1])] = "ends"
    found: dict[str, str] = {
        dist.group.WORLD.group_name: "world",  # type: ignore[union-attr]
        topology.control_group.group_name: "control",
    }

    def name_of(group: dist.ProcessGroup) -> str:
        key = group.group_name
        if key not in found:
            ranks = tuple(dist.get_process_group_ranks(group))
            found[key] = "control" if BACKENDS.get(key) == "gloo" else by_ranks.get(ranks, f"other of {len(ranks)}")
        return found[key]

    return name_of


class Neighbour:
    """What the stage before, or after, says of what it sends.

    Args:
        config: The configuration.
        plan: Its batch plan.
        topology: This rank's place.
        is_partitioned: Whether DeepSpeed cuts what is sent among the tensor-parallel ranks.
    """

    def __init__(self, config: Config, plan: BatchPlan, topology: Any, is_partitioned: bool) -> None:
        split = plan.tensor if config.parallel.sequence_parallel else 1
        batch, sequence = plan.micro_batch_size, plan.sequence_length
        hidden = [batch, sequence // split, config.model.hidden_size]
        numel, dtype = math.prod(hidden), DTYPES[config.train.precision]
        borders = [numel * part // plan.tensor for part in range(plan.tensor + 1)]
        self._partition = [len(hidden), *hidden, plan.tensor, topology.tensor_rank, *borders]
        self._tensors: list[tuple[torch.dtype, list[int]]] = [(dtype, hidden)]
        if is_partitioned:
            self._tensors = [(torch.int64, [len(self._partition)]), (dtype, [numel // plan.tensor])]
        model = config.model
        if config.data.document_attention == "masked":
            self._tensors.append((torch.int64, [batch, sequence]))
        if max(model.embedding_dropout, model.attention_dropout, model.residual_dropout) > 0.0:
            self._tensors.append((torch.int64, [batch]))

    def says(self, received: torch.Tensor) -> list[int] | None:
        """Returns the values of a received tensor of integers that is about others; None: it is none of these."""
        if received.dtype == torch.int32 and received.numel() == TENSOR_META_SIZE:
            message = self._announcement()
            return message + [0] * (TENSOR_META_SIZE - len(message))
        if received.dtype == torch.int64 and received.shape == (len(self._partition),):
            return self._partition
        return None

    def _announcement(self) -> list[int]:
        """The message before a stage's first activations (PipelineEngine._send_tensor_meta)."""
        described = [[PipelineEngine.DTYPE_TO_ID[dtype], len(shape), *shape] for dtype, shape in self._tensors]
        return [0, *described[0]] if len(described) == 1 else [2, len(described), *chain(*described)]
