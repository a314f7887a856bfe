"""Comparing copies that must be equal: parameters that several tensor, pipeline or data ranks hold.

Only the owner's copy is stored. Each rank reduces its copies to one checksum per parameter and part
(model/bit_checksum.py); those of a tensor's partitions over data ranks add up to that of the whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from mlra_scale.checkpoint.fragments import Part, parts_of
from mlra_scale.model.bit_checksum import MODULUS, bit_checksum

if TYPE_CHECKING:
    from mlra_scale.checkpoint.saving import RankReport
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel import Engine
    from mlra_scale.parallel.fragments import Fragment


class Digest(NamedTuple):
    """The checksum of what a rank holds of a parameter, and the number of elements that it covers."""

    numel: int
    value: int


Digests = dict[tuple[str, Part], Digest]


def copied_parameters(engine: Engine) -> frozenset[str]:
    """Returns the parameters that some rank holds without being their owner; collective, the same on every rank."""
    names = sorted(engine.table)
    held = {fragment.name for fragment in engine.held_fragments()}
    # A number per parameter, added up on the way: names of every rank on every rank would be megabytes of thousands.
    is_copied = torch.tensor([name in held and not engine.owns(name) for name in names], dtype=torch.int32)
    dist.all_reduce(is_copied, op=dist.ReduceOp.MAX, group=engine.topology.control_group)
    return frozenset(name for name, is_one in zip(names, is_copied.tolist(), strict=True) if is_one)


def digests_on_device(
    fragments: Iterable[Fragment], names: frozenset[str]
) -> tuple[list[tuple[str, Part, int]], torch.Tensor]:
    """Computes checksums of the fragments of the named parameters, on the device and without waiting for it.

    Returns:
        Parameter, part and number of elements of each checksum, and the checksums (int64).
    """
    keys, values = [], []
    for fragment in fragments:
        if fragment.name in names:
            for part, tensor in parts_of(fragment):
                keys.append((fragment.name, part, tensor.numel()))
                values.append(bit_checksum(tensor, fragment.start))
    return keys, torch.stack(values) if values else torch.empty(0, dtype=torch.int64)


def collect(keys: list[tuple[str, Part, int]], values: Iterable[int]) -> Digests:
    """Adds up the checksums of the fragments of each parameter."""
    found: Digests = {}
    for (name, part, numel), value in zip(keys, values, strict=True):
        before = found.get((name, part), Digest(0, 0))
        found[name, part] = Digest(before.numel + numel, (before.value + value) % MODULUS)
    return found


def differing_copies(reports: Iterable[RankReport], table: ParameterTable, tensor: int) -> str | None:
    """Compares the copies of all ranks; `tensor` is the tensor-parallel degree.

    Returns:
        None where all are equal, else the first parameter that differs, and between which ranks.
    """
    # By what must be equal, then by model-parallel coordinates: the pieces of their data ranks make up one copy.
    copies: dict[tuple[str, Part, int], dict[tuple[int, int], list[tuple[int, Digest]]]] = defaultdict(dict)
    for report in reports:
        for (name, part), digest in report.digests.items():
            shard = 0 if table[name].shard_dim is None else report.tensor_rank
            holders = copies[name, part, shard].setdefault((report.pipeline_rank, report.tensor_rank), [])
            holders.append((report.rank, digest))
    for (name, part, _), by_coordinates in copies.items():
        numel = table[name].numel() // (1 if table[name].shard_dim is None else tensor)
        versions: dict[int, list[str]] = defaultdict(list)
        for holders in by_coordinates.values():
            for value, ranks in _versions(name, holders, numel):
                versions[value].append(ranks)
        if len(versions) > 1:
            differing = " and ".join(f"rank(s) {', '.join(ranks)}" for ranks in versions.values())
            what = name if part == "weight" else f"{part} of {name}"
            return f"copies of {what} that should be equal differ between {differing}"
    return None


def _versions(name: str, holders: list[tuple[int, Digest]], numel: int) -> Iterable[tuple[int, str]]:
    """The copies that the data ranks of one model-parallel rank hold: each a whole one, or together one."""
    pieces = []
    for rank, digest in holders:
        if digest.numel == numel:
            yield digest.value, str(rank)
        else:
            pieces.append((rank, digest))
    if pieces:
        assert sum(digest.numel for _, digest in pieces) == numel, (name, pieces)
        yield sum(digest.value for _, digest in pieces) % MODULUS, "+".join(str(rank) for rank, _ in pieces)
