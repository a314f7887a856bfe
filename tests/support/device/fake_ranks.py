"""The other ranks, which are not there: a process group of any size, and what they would have sent.

Collectives leave tensors as they are: every rank's values count as the same.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

BACKENDS: dict[str, str] = {}
"""The backend that the code asked for, by name of group; one that is not here has the default's: nccl."""


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
    """Has collectives of Python objects answer as if every rank had sent what this one sends."""

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
