"""Fixtures for all tests."""

import os

# Before torch is imported anywhere: tests run on the CPU and one thread per process. Also where there is a GPU: many of
# them run in this very process, and train.device=auto or a bad device would have another outcome there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.pool import PoolRegistry, WorkerPool
from tests.support.training_runs import make_data


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[Callable[[int], WorkerPool]]:
    """``worker_pool(world_size)`` gives a pool of that many processes, kept for the whole session."""
    registry = PoolRegistry()
    yield registry
    registry.close()


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set whose vocabulary is that of the debug preset."""
    return make_data(tmp_path_factory.mktemp("data") / "python-docs")
