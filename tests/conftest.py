"""Fixtures for all tests."""

import os

# Before torch is imported anywhere: tests run on the CPU and one thread per process.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator

import pytest

from tests.support.pool import PoolRegistry, WorkerPool


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[Callable[[int], WorkerPool]]:
    """``worker_pool(world_size)`` gives a pool of that many processes, kept for the whole session."""
    registry = PoolRegistry()
    yield registry
    registry.close()
