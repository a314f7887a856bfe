"""Checks of the nodes by the ranks themselves, before the first step: a bad node is named.

Alone, each rank lets its device compute a known product. Together they check that every node sees what the others write
to the run directory, and that a sum over all ranks is right; they measure how fast it is, and connect over gloo, as
checkpoints will.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mlra_scale.config import ConfigError, Problem

_SIZE = 256
_BYTES_SUMMED = {"cuda": 256 << 20, "cpu": 4 << 20}
_GLOO_SECONDS = 60.0
_MEETINGS = itertools.count()
_SECONDS_TO_SEE = 30.0
"""How long a shared file system may take to show one node what another wrote (NFS caches names for up to 30 s)."""


class BadNodes(Exception):
    """Some nodes cannot be used.

    Attributes:
        nodes: Their names, with the reason.
        is_common: Whether all ranks raise it together.
    """

    def __init__(self, nodes: Mapping[str, str], is_common: bool) -> None:
        super().__init__("; ".join(f"{node}: {reason}" for node, reason in sorted(nodes.items())))
        self.nodes = dict(nodes)
        self.is_common = is_common


def check_alone(node: str, local_rank: int, device: str) -> None:
    """Checks this rank's own device, `cuda` or `cpu`; raises BadNodes if it is not there or computes wrong."""
    if device == "cuda":
        number = torch.cuda.device_count()
        if local_rank >= number:
            raise BadNodes({node: f"torch sees {number} GPU(s), and there is none for local rank {local_rank}"}, False)
        torch.cuda.set_device(local_rank)
    try:
        is_right = _computes_right(torch.device(f"cuda:{local_rank}" if device == "cuda" else "cpu"))
    except RuntimeError as error:
        raise BadNodes({node: f"{device} of local rank {local_rank} fails: {_first_line(error)}"}, False) from error
    if not is_right:
        raise BadNodes({node: f"{device} of local rank {local_rank} computes wrong"}, False)


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _computes_right(device: torch.device) -> bool:
    """Compares a product of small integers in fp32, which is exact in any order of its sums, with one of integers."""
    rows = torch.arange(_SIZE * _SIZE).reshape(_SIZE, _SIZE) % 7
    expected = rows @ rows.T
    product = rows.to(device, torch.float32) @ rows.T.to(device, torch.float32)
    return bool((product.cpu().long() == expected).all())


def check_together(device: torch.device, node: str, shared: Path) -> None:
    """Checks what only all ranks together can; collective over the default group.

    Args:
        device: Of this rank.
        node: Its name.
        shared: The folder of the attempt's logs, which all nodes must see alike.

    Raises:
        BadNodes: On all ranks.
        ConfigError: On all ranks: no two nodes reach each other over gloo.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = _gathered((node, name, _wrong_parts(device)))
    nodes = [of_rank[0] for of_rank in facts]
    # One look from each node is enough, and kinder to the file system.
    unseen = _gathered(_unseen_nodes(shared, nodes) if nodes.index(node) == rank else [])
    seconds = _seconds_of_sum(device)
    _check_gloo(nodes)
    bad = blamed_for_sum(nodes, [of_rank[2] for of_rank in facts]) | blamed_for_folder(nodes, unseen)
    if bad:
        raise BadNodes(bad, True)
    if rank == 0:
        devices = sorted({of_rank[1] for of_rank in facts})
        rate = 2 * (world_size - 1) / world_size * _BYTES_SUMMED[device.type] / seconds / 1e9 if seconds else 0.0
        print(
            f"checks passed: {world_size} rank(s) on {len(set(nodes))} node(s), "
            f"{', '.join(devices)}; a sum of {_BYTES_SUMMED[device.type] >> 20} MiB over all ranks takes "
            f"{1000 * seconds:.1f} ms, {rate:.2f} GB/s over each rank's link",
            flush=True,
        )


def _gathered(value: Any) -> list[Any]:
    """Returns the values of all ranks; collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_gloo(nodes: Sequence[str]) -> None:
    """Connects all ranks over gloo, as build_topology does; collective.

    Where one node is not reached, ranks of all nodes fail. Then nodes connect in pairs, which shows the one to blame.
    """
    faults = _faults_over_gloo(None)
    found = {node: text for node, text in zip(nodes, faults, strict=True) if text}
    if not found:
        return

    def connect(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        ranks = [[nodes.index(node) for node in pair] for pair in pairs]
        failed = _faults_over_gloo(next((pair for pair in ranks if dist.get_rank() in pair), []))
        return [not any(failed[rank] for rank in pair) for pair in ranks]

    unreached = unreached_of(list(dict.fromkeys(nodes)), connect)
    if unreached:
        text = "gloo does not connect it with other nodes (GLOO_SOCKET_IFNAME): "
        raise BadNodes({node: f"{text}{found.get(node, 'its ranks time out')}" for node in unreached}, True)
    if len(found) < len(set(nodes)):
        raise BadNodes({node: f"gloo does not connect its ranks: {text}" for node, text in found.items()}, True)
    remedy = (
        "is the interface over which gloo should connect the ranks, and does not: name one on which all nodes reach "
        f"each other (`ip addr` lists them), in the environment of the job; {nodes[0]} reports: {found[nodes[0]]}"
    )
    raise ConfigError([Problem("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME"), remedy)])


def _faults_over_gloo(ranks: Sequence[int] | None) -> list[str]:
    """Connects ranks over gloo and returns what failed, by rank; collective over all ranks.

    Args:
        ranks: The group of this rank, whose ranks all pass it; empty: none; None: all ranks.
    """
    fault, timeout, number = "", timedelta(seconds=_GLOO_SECONDS), next(_MEETINGS)
    try:
        if ranks is None:
            group = dist.new_group(backend="gloo", timeout=timeout)
            dist.barrier(group)
            dist.destroy_process_group(group)
        elif ranks:
            # Names that new_group makes may differ between ranks after it has failed.
            store = dist.PrefixStore(f"pair-{number}-{ranks[0]}-{ranks[1]}", _get_default_store())
            pair = dist.ProcessGroupGloo(store, [*ranks].index(dist.get_rank()), len(ranks), timeout)
            pair.barrier().wait()  # type: ignore[attr-defined]
    except RuntimeError as error:
        fault = _first_line(error)
    return _gathered(fault)


def unreached_of(nodes: Sequence[str], connect: Callable[[Sequence[tuple[str, str]]], list[bool]]) -> list[str]:
    """Finds the nodes that do not connect with any of the nodes that connect with each other, in few rounds.

    `connect` returns which of some disjoint pairs, all tried at the same time, connect. The result is empty where no
    pair does.
    """
    good: list[str] = []
    for shift in range(3 if len(nodes) > 2 else len(nodes) - 1):
        turned = [*nodes[shift:], *nodes[:shift]]
        pairs = list(zip(turned[::2], turned[1::2], strict=False))
        good = [node for pair, is_met in zip(pairs, connect(pairs), strict=True) if is_met for node in pair]
        if good:
            break
    suspects, bad = [node for node in nodes if node not in good], []
    while good and suspects:
        pairs = list(zip(suspects, good, strict=False))
        bad += [pair[0] for pair, is_met in zip(pairs, connect(pairs), strict=True) if not is_met]
        suspects = suspects[len(pairs) :]
    return bad


def blamed_for_folder(nodes: Sequence[str], unseen: Sequence[Sequence[str]]) -> dict[str, str]:
    """Returns the nodes that do not share the run directory, with the reason; the same on every rank.

    Two nodes share it if each sees what the other has written. A node that shares it with no other is to
    blame; if all are like that, all but the first. If none is, the nodes that miss the file of some other are to blame.

    Args:
        nodes: Of each rank.
        unseen: By rank, the nodes whose file it does not see; empty where it has not looked.
    """
    apart = {frozenset((node, other)) for node, others in zip(nodes, unseen, strict=True) for other in others}
    names = list(dict.fromkeys(nodes))
    bad = [name for name in names if all(frozenset((name, other)) in apart for other in names if other != name)]
    bad = bad[1:] if len(bad) == len(names) else bad
    if bad:
        reason = "the run directory is not the one that the other nodes have: it must be on a shared file system"
        return dict.fromkeys(bad, reason)
    return {
        node: f"does not see in the run directory what {', '.join(others)} wrote"
        for node, others in zip(nodes, unseen, strict=True)
        if others
    }


def blamed_for_sum(nodes: Sequence[str], wrong: Sequence[Sequence[int]]) -> dict[str, str]:
    """Returns the nodes to blame for a wrong sum, with the reason; the same on every rank.

    Args:
        nodes: Of each rank.
        wrong: By rank, the ranks whose part was wrong in the sum that it got.
    """
    if wrong and all(wrong):
        # All ranks got the same wrong parts: they were sent wrong.
        return {nodes[rank]: f"a sum over all ranks has a wrong part of rank {rank}" for rank in sorted(set(wrong[0]))}
    return {
        node: f"rank {rank} got a wrong sum, and others the right one"
        for rank, (node, parts) in enumerate(zip(nodes, wrong, strict=True))
        if parts
    }


def _unseen_nodes(shared: Path, nodes: Sequence[str]) -> list[str]:
    """Returns the nodes whose files (node/__main__.py) this rank does not see."""

    def content(name: str) -> bytes | None:
        with contextlib.suppress(OSError):
            return (shared / name).read_bytes()
        return None

    deadline = time.monotonic() + _SECONDS_TO_SEE
    while True:
        nonce = content("nonce")
        unseen = [node for node in dict.fromkeys(nodes) if nonce is None or content(f"nonce-{node}") != nonce]
        if not unseen or time.monotonic() > deadline:
            return unseen
        with contextlib.suppress(OSError):
            os.listdir(shared)  # makes NFS look again
        time.sleep(0.5)


def _wrong_parts(device: torch.device) -> list[int]:
    """Returns the ranks whose part of a sum is wrong: each rank adds at its own position."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    values = torch.zeros(world_size, dtype=torch.int64, device=device)
    values[rank] = rank + 1
    dist.all_reduce(values)
    wrong: list[int] = (values.cpu() != torch.arange(1, world_size + 1)).nonzero().flatten().tolist()
    return wrong


def _seconds_of_sum(device: torch.device) -> float:
    """Times an all-reduce, the second of two."""
    values = torch.ones(_BYTES_SUMMED[device.type] // 4, device=device)
    for _ in range(2):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        float(values[0])  # waits for the device
        seconds = time.perf_counter() - started
    return seconds
