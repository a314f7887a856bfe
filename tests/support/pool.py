"""Pools of ranks for multi-process tests, one per world size, that serve all tests of a session.

A process that has imported torch, DeepSpeed and Megatron costs about ten seconds. A function runs on every rank in
a process group of its own; what fails on any rank fails the test at once, see benchmarks/ranks.py.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.ranks import Ranks
from tests.support.worker import Call, serve_calls

WORKER_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
START_TIMEOUT, CLEAN_UP_TIMEOUT = 180.0, 60.0
KEPT_WORLD_SIZES = (1, 2, 4)


class WorkerPool:
    """``world_size`` ranks, started at first use and again after a failure that left them unusable."""

    def __init__(self, world_size: int, group_timeout: float = 180.0, grace: float = 10.0):
        self.world_size = world_size
        self._group_timeout, self._grace = group_timeout, grace
        self._ranks: Ranks | None = None
        self._calls = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the living ranks; empty when the pool is down."""
        return [] if self._ranks is None else self._ranks.pids

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Calls ``function(rank, world_size, *args)`` on every rank, with gloo as the default process group.

        Args:
            function: a function at module level of an importable module (a test module will do).
            args: picklable arguments, the same for every rank.
            timeout: seconds for the whole call; start-up of the processes does not count.

        Returns:
            The results by rank.

        Raises:
            RanksFailed: some rank raised, hung or died.
        """
        if not self.pids:
            self._ranks = Ranks(
                f"pool of {self.world_size}",
                self.world_size,
                serve_calls,
                self._group_timeout,
                timeout_s=START_TIMEOUT,
                environment=WORKER_ENVIRONMENT,
                grace_s=self._grace,
                joins_group=False,
            )
        assert self._ranks is not None
        self._calls += 1
        name = f"{function.__module__}.{function.__qualname__}"
        call = Call(self._calls, pickle.dumps((function, args)), tuple(sys.path))
        try:
            return [pickle.loads(result) for result in self._ranks.ask(call, name, timeout)]
        finally:
            if self.pids:
                self._ranks.receive(f"cleaning up after {name}", CLEAN_UP_TIMEOUT)

    def close(self) -> None:
        """Ends the ranks."""
        if self._ranks is not None:
            self._ranks.close()


Pools = Callable[[int], WorkerPool]
"""Gives the pool of a world size: the fixture `worker_pool`, or a registry."""


class PoolRegistry:
    """Hands out one pool per world size; sizes that are rarely used live only until another one is asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, WorkerPool] = {}

    def __call__(self, world_size: int) -> WorkerPool:
        for size in [size for size in self._pools if size not in KEPT_WORLD_SIZES and size != world_size]:
            self._pools.pop(size).close()
        if world_size not in self._pools:
            self._pools[world_size] = WorkerPool(world_size)
        return self._pools[world_size]

    def close(self) -> None:
        """Ends all pools."""
        while self._pools:
            self._pools.popitem()[1].close()
