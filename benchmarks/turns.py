"""Lets groups of processes that are alive at the same time take turns, so that their times can be compared.

A layout needs process groups of its own, and the libraries keep one layout per process. So every layout gets its own
processes; all of them stay alive and follow one list of turns, and whoever has no turn sleeps until it has. A slow
minute of the machine then hits all layouts, as it does the contenders of one process.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any, TypeVar

import torch.distributed as dist

from benchmarks.processes import on_processes

_FAILED = "failed"

Thing = TypeVar("Thing")

Measured = dict[str, float]
Action = Callable[[int], Measured]
"""What a rank does in a turn, given the number of the round; returns what it measured besides the time."""


@dataclass(frozen=True)
class World:
    """Processes that belong together.

    Attributes:
        name: For the list of turns.
        size: Number of processes.
        build: Called in each of them once; returns what they can do, by name.
        arguments: Of `build`.
    """

    name: str
    size: int
    build: Callable[..., Mapping[str, Action]]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One turn: who does what at the same time.

    Attributes:
        name: What the times are filed under.
        parts: (world, what it does).
    """

    name: str
    parts: tuple[tuple[str, str], ...]


def rotated(things: Sequence[Thing], number: int) -> list[Thing]:
    """The order of a round: it begins one further along in every round, so that nobody is always the first."""
    shift = number % len(things)
    return [*things[shift:], *things[:shift]]


def take_turns(
    worlds: Sequence[World], turns: Sequence[Turn], rounds: int, timeout_s: float
) -> dict[str, list[list[Measured]]]:
    """Runs every turn once per round, one after another, in an order that rotates; a round before them is warm-up.

    Args:
        worlds: The processes.
        turns: The turns of a round.
        rounds: Rounds that count.
        timeout_s: Seconds for everything.

    Returns:
        By turn and round, what each rank measured, worlds in the order of the turn's parts: "seconds" among it. The
        first list is of the warm-up.

    Raises:
        RuntimeError: A process failed or was not done in time; all are ended.
    """
    program = [(turn, number) for number in range(rounds + 1) for turn in rotated(turns, number)]
    sizes = {world.name: world.size for world in worlds}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(len(worlds)) as threads:
        running = [
            threads.submit(
                on_processes, world.size, _follow, world, sizes, program, store.port, timeout_s, timeout_s=timeout_s
            )
            for world in worlds
        ]
        for task in as_completed(running):
            if task.exception() is not None:
                _release_all(store, len(program))
        found = {world.name: task.result() for world, task in zip(worlds, running, strict=True)}
    results: dict[str, list[list[Measured]]] = {turn.name: [] for turn in turns}
    for index, (turn, _) in enumerate(program):
        results[turn.name].append([rank[index] for world, _ in turn.parts for rank in found[world]])
    return results


def _follow(
    world: World, sizes: Mapping[str, int], program: Sequence[tuple[Turn, int]], port: int, timeout_s: float
) -> dict[int, Measured]:
    """What a process does: its part of the program."""
    actions = world.build(*world.arguments)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
    _meet(store, "built", sum(sizes.values()))
    found: dict[int, Measured] = {}
    for index, (turn, number) in enumerate(program):
        mine = dict(turn.parts).get(world.name)
        if mine is None:
            continue
        if index > 0:
            _wait(store, f"over {index - 1}")
        count = sum(sizes[name] for name, _ in turn.parts)
        _meet(store, f"ready {index}", count)
        started = perf_counter()
        measured = actions[mine](number)
        found[index] = {"seconds": perf_counter() - started, **measured}
        if store.add(f"done {index}", 1) == count:
            store.set(f"over {index}", "")
    return found


def _meet(store: Any, name: str, count: int) -> None:
    """Returns when `count` processes are here."""
    if store.add(f"at {name}", 1) == count:
        store.set(name, "")
    _wait(store, name)


def _wait(store: Any, name: str) -> None:
    store.wait([name])
    if store.check([_FAILED]):
        raise RuntimeError("another process failed")


def _release_all(store: Any, num_turns: int) -> None:
    """A process has failed: nobody waits for it any more, and all find out."""
    store.set(_FAILED, "")
    names = ("built", *(f"{word} {index}" for index in range(num_turns) for word in ("ready", "over")))
    for name in names:
        store.set(name, "")
