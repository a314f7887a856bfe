"""Checks of the nodes by the ranks themselves, before the first step: a bad node is named instead of being suffered.

Alone, each rank asks its device for a product that it knows. Together they compare what they see of a shared folder,
check that a sum over all of them is right, measure how fast it is, and connect over gloo, as checkpoints will.
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
    """Checks this rank's own device.

    Args:
        node: Its name.
        local_rank: Number of the device on the node.
        device: `cuda` or `cpu`.

    Raises:
        BadNodes: The device is not there, or computes wrong.
    """
    if device == "cuda":
        number = torch.cuda.device_count()
        if local_rank >= number:
            raise BadNodes({node: f"torch sees {number} GPU(s), and there is none for local rank {local_rank}"}, False)
        torch.cuda.set_device(local_rank)
    try:
        is_right = _computes_right(torch.device(f"cuda:{local_rank}" if device == "cuda" else "cpu"))
    except RuntimeError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadNodes({node: f"{device} of local rank {local_rank} fails: {first_line}"}, False) from error
    if not is_right:
        raise BadNodes({node: f"{device} of local rank {local_rank} computes wrong"}, False)


def _computes_right(device: torch.device) -> bool:
    """Compares a product of small integers, which is exact in fp32 whatever the order of its sums, with integers'."""
    rows = torch.arange(_SIZE * _SIZE).reshape(_SIZE, _SIZE) % 7
    expected = rows @ rows.T
    product = rows.to(device, torch.float32) @ rows.T.to(device, torch.float32)
    return bool((product.cpu().long() == expected).all())


def check_together(device: torch.device, node: str, shared: Path) -> None:
    """Checks what only all ranks together can; collective over the default group.

    Args:
        device: Of this rank.
        node: Its name.
        shared: A folder that all nodes must see alike.

    Raises:
        BadNodes: On all ranks.
        ConfigError: On all ranks: no two nodes reach each other over gloo.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    facts: list[Any] = [None] * world_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    fault, wrong = _write_token(shared, node, rank), _wrong_parts(device)
    dist.all_gather_object(facts, (node, fault, name, wrong))
    nodes = [of_rank[0] for of_rank in facts]
    # One look from each node is enough, and kinder to the file system.
    fault = _unseen_token(shared, nodes) if nodes.index(node) == rank else ""
    seconds = _seconds_of_sum(device)
    results: list[Any] = [None] * world_size
    dist.all_gather_object(results, fault)
    _check_gloo(nodes)
    _remove_token(shared, rank)
    bad = blamed_for_sum(nodes, [of_rank[3] for of_rank in facts])
    bad |= blamed(nodes, [of_rank[1] for of_rank in facts], results)
    if bad:
        raise BadNodes(bad, True)
    if rank == 0:
        devices = sorted({of_rank[2] for of_rank in facts})
        rate = 2 * (world_size - 1) / world_size * _BYTES_SUMMED[device.type] / seconds / 1e9 if seconds else 0.0
        print(
            f"checks passed: {world_size} rank(s) on {len(set(nodes))} node(s), "
            f"{', '.join(devices)}; a sum of {_BYTES_SUMMED[device.type] >> 20} MiB over all ranks takes "
            f"{1000 * seconds:.1f} ms, {rate:.2f} GB/s over each rank's link",
            flush=True,
        )


def _check_gloo(nodes: Sequence[str]) -> None:
    """Makes a group of all ranks over gloo, as build_topology does, and lets them meet in it; collective.

    Where one node is not reached, ranks of all nodes fail. Then nodes meet in pairs, which tells who is to blame.
    """
    faults = _faults_over_gloo(None, len(nodes))
    found = {node: text for node, text in zip(nodes, faults, strict=True) if text}
    if not found:
        return

    def connect(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        ranks = [[nodes.index(node) for node in pair] for pair in pairs]
        mine = next((pair for pair in ranks if dist.get_rank() in pair), [])
        failed = _faults_over_gloo(mine, len(nodes))
        return [not any(failed[rank] for rank in pair) for pair in ranks]

    unreached = unreached_of(list(dict.fromkeys(nodes)), connect)
    if unreached:
        text = "gloo does not connect it with other nodes (GLOO_SOCKET_IFNAME): "
        raise BadNodes({node: f"{text}{found.get(node, 'its ranks time out')}" for node in unreached}, True)
    if len(found) < len(set(nodes)):
        raise BadNodes({node: f"gloo does not connect its ranks: {text}" for node, text in found.items()}, True)
    remedy = (
        "is the interface over which gloo should connect the ranks, and does not: name one on which all nodes reach "
        f"each other (`ip addr` lists them), in the environment of the job; {nodes[0]} says: {found[nodes[0]]}"
    )
    raise ConfigError([Problem("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME"), remedy)])


def _faults_over_gloo(ranks: Sequence[int] | None, world_size: int) -> list[str]:
    """Lets ranks meet over gloo and returns what failed, by rank; collective over all ranks.

    Args:
        ranks: The group of this rank, which others call with too; empty: none; None: all ranks.
        world_size: Number of all ranks.
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
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
    faults: list[Any] = [None] * world_size
    dist.all_gather_object(faults, fault)
    return faults


def unreached_of(nodes: Sequence[str], connect: Callable[[Sequence[tuple[str, str]]], list[bool]]) -> list[str]:
    """Finds the nodes that do not connect with others, in few rounds of pairs that meet at the same time.

    Args:
        nodes: All nodes.
        connect: Says of disjoint pairs which of them connect.

    Returns:
        Nodes that do not connect with one that does with another; empty where there is none, or where no pair connects.
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


def blamed(nodes: Sequence[str], own_faults: Sequence[str], seen_faults: Sequence[str]) -> dict[str, str]:
    """Says which nodes are bad, from what all ranks found; the same on every rank.

    A rank's own fault is its node's. Where a rank does not see what others wrote, the odd ones out are to blame: one
    node that sees nothing of the others while these see each other; or a node of which nobody else sees anything.

    Args:
        nodes: Of each rank.
        own_faults: What each rank found wrong with itself; empty: nothing.
        seen_faults: Nodes whose file a rank did not see, joined by commas; empty: it saw all, or did not look.
    """
    bad = {node: fault for node, fault in zip(nodes, own_faults, strict=True) if fault}
    unseen = {node: set(text.split(",")) for node, text in zip(nodes, seen_faults, strict=True) if text}
    if bad or not unseen:
        return bad
    everyone = list(dict.fromkeys(nodes))
    for node in everyone:
        others = set(everyone) - {node}
        is_blind = unseen.get(node, set()) >= others
        is_hidden = all(node in unseen.get(other, set()) for other in others)
        # Two nodes that do not see each other: the one without the job's first rank is left.
        if (is_blind or is_hidden) and not (len(everyone) == 2 and node == everyone[0]):
            bad[node] = "the run directory is not the one that the other nodes have: it must be on a shared file system"
    return bad or {
        node: f"does not see in the run directory what {', '.join(sorted(names))} wrote"
        for node, names in unseen.items()
    }


def blamed_for_sum(nodes: Sequence[str], wrong: Sequence[Sequence[int]]) -> dict[str, str]:
    """Says which nodes are to blame for a wrong sum; the same on every rank.

    Args:
        nodes: Of each rank.
        wrong: By rank, the ranks whose part was wrong in the sum that it got.
    """
    if not any(wrong):
        return {}
    if all(wrong):
        # Everybody got the same wrong parts: they were sent so.
        return {nodes[rank]: f"a sum over all ranks has a wrong part of rank {rank}" for rank in sorted(set(wrong[0]))}
    return {
        node: f"rank {rank} got a wrong sum, and others the right one"
        for rank, (node, parts) in enumerate(zip(nodes, wrong, strict=True))
        if parts
    }


def _token(shared: Path, rank: int) -> Path:
    return shared / f".seen-{rank:05d}"


def _write_token(shared: Path, node: str, rank: int) -> str:
    try:
        _token(shared, rank).write_text(f"{node}\n", encoding="utf-8")
    except OSError as error:
        return f"cannot write to {shared}: {error.strerror}"
    return ""


def _unseen_token(shared: Path, nodes: Sequence[str]) -> str:
    """Names the nodes whose files this rank does not see."""
    first_ranks = {node: rank for rank, node in reversed(list(enumerate(nodes)))}
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while True:
        unseen = [node for node, rank in first_ranks.items() if not _is_there(_token(shared, rank), node)]
        if not unseen or time.monotonic() > deadline:
            return ",".join(unseen)
        with contextlib.suppress(OSError):
            os.listdir(shared)  # makes NFS look again
        time.sleep(0.5)


def _is_there(path: Path, node: str) -> bool:
    try:
        return path.read_text(encoding="utf-8").strip() == node
    except OSError:
        return False


def _remove_token(shared: Path, rank: int) -> None:
    try:
        _token(shared, rank).unlink(missing_ok=True)
    except OSError as error:
        print(f"{_token(shared, rank)} stays: {error.strerror}", flush=True)


def _wrong_parts(device: torch.device) -> list[int]:
    """Lets every rank add at a place of its own, so that a wrong sum says whose part is missing."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    values = torch.zeros(world_size, dtype=torch.int64, device=device)
    values[rank] = rank + 1
    dist.all_reduce(values)
    expected = torch.arange(1, world_size + 1)
    wrong: list[int] = (values.cpu() != expected).nonzero().flatten().tolist()
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
