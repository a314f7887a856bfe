"""What every rank of a stage holds of the matrices of muon and spectron, and what all of them send for it.

MatrixExchange asks the other ranks when an engine is built. Here the arithmetic of DeepSpeed's partitions answers for
them, which for the traced rank must give what the rank really holds.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

Runs = dict[str, tuple[int, int]]
"""First element and number of elements that a rank holds of parameters, counted in its tensor-parallel shard."""


class MatrixRuns:
    """Answers for the other ranks from `install` on."""

    def __init__(self) -> None:
        self.by_data_rank: list[Runs] = []
        self.num_rounds = 0
        self._infos: list[Any] = []
        self._rules: dict[str, Any] = {}
        self._tensor = 1
        self._is_replicated = False

    def install(self) -> None:
        """Has the next engine's MatrixExchange find what the other ranks hold."""
        from mlra_scale.parallel.engine import Engine
        from mlra_scale.parallel.matrix_exchange import MatrixExchange

        build, exchange = Engine._build_matrix_optimizer, MatrixExchange.__init__

        def build_answered(engine: Any, named: Any) -> Any:
            mine = {each.name: (each.start, each.values.numel()) for each in engine._view.weights(with_moments=False)}
            self.by_data_rank = _runs_of_data_ranks(engine, named)
            self._rules, self._is_replicated = engine.rules, engine._view.is_replicated_over_data
            held = self.by_data_rank[engine.topology.data_rank]
            assert held == mine, f"DeepSpeed cuts otherwise: {set(held.items()) ^ set(mine.items())}"
            return build(engine, named)

        def exchange_answered(of: Any, infos: Any, held: Any, topology: Any, *arguments: Any) -> None:
            self._infos, self._tensor = infos, topology.tensor
            with mock.patch("torch.distributed.all_gather", self._all_gather):
                exchange(of, infos, held, topology, *arguments)
            self.num_rounds = len(of.rounds)

        Engine._build_matrix_optimizer = build_answered  # type: ignore[method-assign,assignment]
        MatrixExchange.__init__ = exchange_answered  # type: ignore[method-assign,assignment]

    def _all_gather(self, gathered: list[torch.Tensor], runs: torch.Tensor, group: Any) -> None:
        for rank, tensor in enumerate(gathered):
            held = self.by_data_rank[rank // self._tensor]
            tensor.copy_(torch.tensor([held.get(info.name, (0, 0)) for info in self._infos]))

    def sent_by_ranks(self, element: int) -> list[float]:
        """Returns the bytes that every rank of the stage sends in a step; `element` are those of a number.

        Each part of a matrix goes to the owner; where several ranks hold the same, that nearest to the owner sends it.
        What becomes of it goes to all who hold parts. Spectron sums a number per row and per column of every factor.
        """
        from mlra_scale.model.matrix_rounds import rounds_of

        tensor, num_ranks = self._tensor, self._tensor * len(self.by_data_rank)
        factors = [info for info in self._infos if self._rules[info.name].optimizer == "spectron"]
        of_sums = 4 * sum(sum(info.shape) for info in factors) * 2 * (num_ranks - 1) / num_ranks
        sent = [of_sums] * num_ranks
        by_rank = [self.by_data_rank[rank // tensor] for rank in range(num_ranks)]
        holders = [
            {rank: runs[info.name][1] for rank, runs in enumerate(by_rank) if runs.get(info.name, (0, 0))[1]}
            for info in self._infos
        ]
        for indices in rounds_of([info.shape for info in self._infos], num_ranks, holders):
            for owner, index in indices.items():
                info = self._infos[index]
                for rank in {*range(num_ranks)} - {owner}:
                    num_held = self.by_data_rank[rank // tensor].get(info.name, (0, 0))[1]
                    has_other_shard = info.shard_dim is not None or rank % tensor == owner % tensor
                    if has_other_shard and (not self._is_replicated or rank // tensor == owner // tensor):
                        sent[rank] += element * num_held
                    sent[owner] += element * num_held
        return sent


def _runs_of_data_ranks(engine: Any, named: Any) -> list[Runs]:
    """Returns what each data rank holds of the parameters of a stage.

    ZeRO 3 cuts every parameter into equal pieces, of which the last may be shorter or missing; ZeRO 1 and 2 cut each
    parameter group, one parameter after the other, into equal partitions. Without ZeRO every rank holds everything.
    """
    optimizer, ranks = engine.deepspeed_engine.optimizer, range(engine.topology.data)
    if isinstance(optimizer, torch.optim.Optimizer):
        return [{name: (0, parameter.numel()) for name, parameter in named.items()} for _ in ranks]
    runs: list[Runs] = [{} for _ in ranks]

    def cut(name: str, numel: int, offset: int, size: int) -> None:
        """A parameter that begins `offset` elements after the beginning of what is cut into pieces of `size`."""
        for rank in ranks:
            start, end = max(rank * size - offset, 0), min((rank + 1) * size - offset, numel)
            if start < end:
                runs[rank][name] = (start, end - start)

    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for name, parameter in named.items():
            cut(name, parameter.ds_numel, 0, parameter.ds_tensor.ds_numel)
        return runs
    names = {id(parameter): name for name, parameter in named.items()}
    is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    groups = optimizer.bf16_groups if is_bf16 else optimizer.round_robin_bit16_groups
    flat = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    for group, partition in zip(groups, flat, strict=True):
        offset = 0
        for parameter in group:
            cut(names[id(parameter)], parameter.numel(), offset, partition.numel())
            offset += parameter.numel()
    return runs
