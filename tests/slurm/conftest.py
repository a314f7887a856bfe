"""One Slurm cluster for all tests that need one."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, slurm_missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three running nodes of the cluster, shared: a test cancels its jobs and restarts the nodes that it killed."""
    reason = slurm_missing()
    if reason is not None:
        pytest.skip(f"needs Slurm: {reason}")
    # Long enough for a save on a machine that is busy with other things; tests end their jobs by SIGKILL.
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=3, kill_wait=120) as started:
        yield started
