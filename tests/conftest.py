"""Fixtures for all tests."""

import os

# Before torch is imported anywhere: tests run on the CPU and one thread per process. Also where there is a GPU: many of
# them run in this very process, and train.device=auto or a bad device would have another outcome there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs of tests start no service of wandb, but for those that set wandb.mode.
os.environ["WANDB_MODE"] = "disabled"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.pool import PoolRegistry, WorkerPool
from tests.support.training_runs import make_data
from tests.tiers import Tiers, mark_slow_cases, tiers_of

# A loaded machine is no failure: otherwise Hypothesis limits an example to 200 ms, and the making of examples too.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

DAILY = "not slow and not nightly"
"""What -m is without another one, see pyproject.toml."""
COLLECTED = pytest.StashKey[Tiers]()
"""The tiers of what pytest has collected, before it leaves tests out."""


def pytest_configure(config: pytest.Config) -> None:
    """A test that is named by its id runs in whatever tier it is, unless -m says more than the default does."""
    is_default = config.option.markexpr == DAILY
    if is_default and config.args and all("::" in argument for argument in config.args):
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks slow cases and notes the tiers; a test of two tiers, or a case that is not there, ends pytest here."""
    problems = mark_slow_cases(items)
    if problems and not any("::" in argument for argument in config.args):
        raise pytest.UsageError("\n".join(problems))
    config.stash[COLLECTED] = tiers_of(items)


@pytest.fixture(scope="session")
def collected_tiers(pytestconfig: pytest.Config) -> Tiers:
    """The tiers of each test file that was collected."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[Callable[[int], WorkerPool]]:
    """``worker_pool(world_size)`` gives a pool of that many processes, kept for the whole session."""
    registry = PoolRegistry()
    yield registry
    registry.close()


@pytest.fixture
def one_process() -> Iterator[Any]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set whose vocabulary is that of the debug preset."""
    return make_data(tmp_path_factory.mktemp("data") / "python-docs")
