"""One Slurm cluster for all tests that need one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster, slurm_missing
from tests.slurm.jobs import Submitted, submit


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three running nodes of the cluster, shared: a test cancels its jobs and restarts the nodes that it killed."""
    reason = slurm_missing()
    if reason is not None:
        pytest.skip(f"needs Slurm: {reason}")
    # Long enough for a save on a machine that is busy with other things; tests end their jobs by SIGKILL.
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=3, kill_wait=120) as started:
        yield started


@pytest.fixture
def calm(cluster: SlurmCluster) -> Iterator[None]:
    """Begins with three nodes that are up, and ends without jobs."""
    cluster.start_nodes(3)
    yield
    cluster.cancel_all()


@pytest.fixture
def start(cluster: SlurmCluster, training_data: Path, tmp_path: Path) -> Callable[..., Submitted]:
    """start(script, *overrides, ...): submits a job that trains on the tests' data; see `submit`."""

    def start(script: str, *overrides: str, folder: Path = tmp_path, **options: Any) -> Submitted:
        return submit(cluster, folder, script, *overrides, **{"data": training_data, **options})

    return start
