"""Fixtures of the integration tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pool import WorkerPool
from tests.support.training_runs import Finished, Start, base_command, main_on_rank


@pytest.fixture
def start(tmp_path: Path, training_data: Path, worker_pool: Callable[[int], WorkerPool]) -> Start:
    """start(name, *arguments, num_processes=1, code=0): trains the debug preset into tmp_path/name, on a pool."""

    def run(name: str, *arguments: str, num_processes: int = 1, code: int = 0) -> Finished:
        command = base_command(tmp_path / name, training_data, *arguments)
        finished = worker_pool(num_processes).run(main_on_rank, tuple(command))
        for rank, result in enumerate(finished):
            assert result.code == code, (rank, result.stderr[-4000:])
            assert rank == 0 or result.stdout == "", "one rank prints"
        first: Finished = finished[0]
        return first

    return run
