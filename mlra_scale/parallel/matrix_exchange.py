"""Brings whole matrices to one rank each, and parts of the results back, in every layout.

The ranks of a pipeline stage hold parts of its matrices: shards of tensor parallelism, and of these what ZeRO gives a
data rank. A round is a set of matrices, at most one for each rank of the stage, its owner: a rank that holds it, as far
as the work stays alike. Matrices of about the same work are in one round, so that no owner waits long for another; each
rank keeps one matrix at a time beside its own parts. Every element is sent to the owner once: what several ranks hold
is sent by the one nearest to it. Nothing is sent in a round whose owners hold their matrices alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mlra_scale.model.matrix_rounds import rounds_of
from mlra_scale.model.parameters import ParameterInfo
from mlra_scale.parallel.topology import Topology


@dataclass(frozen=True)
class Part:
    """A run of consecutive elements of a matrix that one rank of the stage holds.

    Attributes:
        rank: The rank's number within the stage: data_rank * tensor + tensor_rank.
        start: First element, counted in the shards of all tensor ranks, one after the other, each row by row.
        numel: Number of elements.
    """

    rank: int
    start: int
    numel: int


@dataclass(frozen=True)
class Transfer:
    """The way of one matrix [M, N] to its owner and back, as this rank sees it.

    Attributes:
        name: Canonical name.
        owner: The rank, within the stage, that gets the whole matrix.
        num_sent: Number of elements that this rank sends to the owner; 0 also where another rank sends the same.
        num_held: Number of elements of which this rank gets the result.
        num_shards: How many tensor ranks hold different parts; 1 where each holds all of it.
        shard_dim: See ParameterInfo.
        senders: Parts that together are the matrix, each once, by `start`; known to the owner only.
        holders: All parts that ranks hold, by `rank`; known to the owner only.
    """

    name: str
    shape: tuple[int, int]
    owner: int
    num_sent: int
    num_held: int
    num_shards: int
    shard_dim: int | None
    senders: tuple[Part, ...] = ()
    holders: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Round:
    """Matrices that are orthogonalised at the same time.

    Attributes:
        transfers: One for each owner, in order of their ranks.
        is_sent, is_returned: Whether any rank sends to another one on the way to the owners, and on the way back.
    """

    transfers: tuple[Transfer, ...]
    is_sent: bool
    is_returned: bool


class MatrixExchange:
    """The rounds of a stage. Collective over its ranks, like `to_owner` and `from_owner`.

    Args:
        infos: The matrices of the stage; the same on all its ranks.
        held: First element and number of elements that this rank holds of a matrix, counted in its tensor-parallel
            shard; matrices of which it holds nothing are missing.
        is_replicated_over_data: Whether every data rank holds the same.
        dtype: Type in which elements are sent.
    """

    def __init__(
        self,
        infos: Sequence[ParameterInfo],
        held: Mapping[str, tuple[int, int]],
        topology: Topology,
        is_replicated_over_data: bool,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self._group = topology.stage_group
        self._tensor, self._num_ranks = topology.tensor, topology.tensor * topology.data
        self.rank = topology.data_rank * topology.tensor + topology.tensor_rank
        self._device = topology.device
        # What each rank holds is a matter of DeepSpeed's flat partitions: they are asked, not computed again.
        runs = torch.tensor([held.get(info.name, (0, 0)) for info in infos], device=topology.device)
        gathered = [torch.empty_like(runs) for _ in range(self._num_ranks)]
        dist.all_gather(gathered, runs, group=self._group)
        runs_of_ranks = [of_rank.tolist() for of_rank in gathered]
        runs_of_matrices = [[of_rank[index] for of_rank in runs_of_ranks] for index in range(len(infos))]
        holders = [{rank: numel for rank, (_, numel) in enumerate(runs) if numel} for runs in runs_of_matrices]
        self.rounds: list[Round] = []
        for indices in rounds_of([info.shape for info in infos], self._num_ranks, holders):
            transfers, is_sent, is_returned = [], False, False
            for owner, index in indices.items():
                parts = self._parts(infos[index], owner, runs_of_matrices[index], is_replicated_over_data)
                is_sent, is_returned = (
                    is_any or any(part.rank != owner for part in each)
                    for is_any, each in zip((is_sent, is_returned), parts, strict=True)
                )
                transfers.append(self._transfer(infos[index], owner, *parts))
            self.rounds.append(Round(tuple(transfers), is_sent, is_returned))

    def _parts(
        self, info: ParameterInfo, owner: int, runs: Sequence[tuple[int, int]], is_replicated_over_data: bool
    ) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """Returns `senders` and `holders` of a matrix: see Transfer."""
        num_shards = self._num_shards(info)
        shard_numel = info.numel() // num_shards
        owner_data, owner_tensor = divmod(owner, self._tensor)
        holders, senders = [], []
        for rank, (start, numel) in enumerate(runs):
            if numel == 0:
                continue
            data_rank, tensor_rank = divmod(rank, self._tensor)
            part = Part(rank, (tensor_rank * shard_numel if num_shards > 1 else 0) + start, numel)
            holders.append(part)
            is_nearest = num_shards > 1 or tensor_rank == owner_tensor
            if is_nearest and (not is_replicated_over_data or data_rank == owner_data):
                senders.append(part)
        senders.sort(key=lambda part: part.start)
        assert sum(part.numel for part in senders) == info.numel(), (info.name, senders)
        return tuple(senders), tuple(holders)

    def _transfer(
        self, info: ParameterInfo, owner: int, senders: tuple[Part, ...], holders: tuple[Part, ...]
    ) -> Transfer:
        rows, columns = info.shape
        num_sent, num_held = (
            sum(part.numel for part in parts if part.rank == self.rank) for parts in (senders, holders)
        )
        tables = (senders, holders) if owner == self.rank else ((), ())
        return Transfer(
            info.name, (rows, columns), owner, num_sent, num_held, self._num_shards(info), info.shard_dim, *tables
        )

    def _num_shards(self, info: ParameterInfo) -> int:
        return 1 if info.shard_dim is None else self._tensor

    def to_owner(self, turn: Round, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sends the parts of a round's matrices to their owners.

        Args:
            turn: The round.
            parts: The elements that this rank holds, 1-D, of any type. Emptied, to free them before matrices come.

        Returns:
            The whole matrix [M, N] that this rank owns in this round, in the type of transport; [0, 0] if it owns none.
        """
        sizes = self._no_sizes()
        for transfer in turn.transfers:
            sizes[transfer.owner] = transfer.num_sent
        outgoing = self._packed([parts[each.name] for each in turn.transfers if each.num_sent > 0], sum(sizes))
        parts.clear()
        mine = self._owned(turn)
        if mine is None:
            self._exchange(outgoing, sizes, self._no_sizes(), turn.is_sent)
            return torch.empty(0, 0, dtype=self.dtype, device=self._device)
        received_sizes = self._sizes(mine.senders)
        received = self._exchange(outgoing, sizes, received_sizes, turn.is_sent)
        del outgoing
        order = [part.rank for part in mine.senders]
        if order != sorted(order):
            of_rank = received.split(received_sizes)
            received = torch.cat([of_rank[rank] for rank in order])
        return _whole(received, mine)

    def from_owner(self, turn: Round, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sends what each owner made of its matrix [M, N] back to all who hold parts of it.

        Returns:
            The elements that this rank holds, 1-D, by name: parts of one buffer.
        """
        mine = self._owned(turn)
        holders = () if mine is None else mine.holders
        flat = matrix if mine is None else _in_shards(matrix, mine)
        del matrix
        sent = [flat[part.start : part.start + part.numel] for part in holders]
        outgoing = self._packed(sent, sum(part.numel for part in holders))
        del flat, sent
        received_sizes = self._no_sizes()
        for transfer in turn.transfers:
            received_sizes[transfer.owner] = transfer.num_held
        received = self._exchange(outgoing, self._sizes(holders), received_sizes, turn.is_returned)
        of_owner = received.split(received_sizes)
        return {each.name: of_owner[each.owner] for each in turn.transfers if each.num_held > 0}

    def _owned(self, turn: Round) -> Transfer | None:
        return next((transfer for transfer in turn.transfers if transfer.owner == self.rank), None)

    def _no_sizes(self) -> list[int]:
        return [0] * self._num_ranks

    def _sizes(self, parts: Sequence[Part]) -> list[int]:
        """Number of elements by rank."""
        sizes = self._no_sizes()
        for part in parts:
            sizes[part.rank] = part.numel
        return sizes

    def _packed(self, tensors: list[torch.Tensor], numel: int) -> torch.Tensor:
        """Copies tensors, in the order of the ranks that they are for, into one of the type and device of transport."""
        packed = torch.empty(numel, dtype=self.dtype, device=self._device)
        if tensors:
            targets = list(packed.split([each.numel() for each in tensors]))
            torch._foreach_copy_(targets, tensors, non_blocking=True)
        return packed

    def _exchange(
        self, outgoing: torch.Tensor, sent_sizes: list[int], received_sizes: list[int], is_any_sent: bool
    ) -> torch.Tensor:
        """Sends each rank its part; returns what all ranks have sent to this one, in the order of ranks."""
        if not is_any_sent:
            return outgoing
        incoming = torch.empty(sum(received_sizes), dtype=self.dtype, device=self._device)
        dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes, group=self._group)
        return incoming


def _whole(flat: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    """Puts the shards of all tensor ranks, one after the other, together to the matrix."""
    rows, columns = transfer.shape
    if transfer.num_shards == 1 or transfer.shard_dim == 0:
        return flat.view(rows, columns)
    return flat.view(transfer.num_shards, rows, -1).transpose(0, 1).reshape(rows, columns)


def _in_shards(matrix: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    """Undoes `_whole`."""
    rows, _ = transfer.shape
    if transfer.num_shards == 1 or transfer.shard_dim == 0:
        return matrix.reshape(-1)
    return matrix.reshape(rows, transfer.num_shards, -1).transpose(0, 1).reshape(-1)
