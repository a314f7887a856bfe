"""One epoch, opened by the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pool import WorkerPool
from tests.unit.data.builders import random_documents, whole_range, write_documents
from tests.unit.data.test_one_epoch import digest_on_rank


@pytest.mark.parametrize("cache_from", [1, 10**9])
def test_ranks_of_a_process_group_read_the_same(
    tmp_path: Path, worker_pool: Callable[[int], WorkerPool], cache_from: int
) -> None:
    # Where torch.distributed runs, Megatron's own caching would have only rank 0 build and the others wait for it.
    prefix = write_documents(tmp_path / "set", random_documents(500, 20))
    expected = digest_on_rank(0, 1, prefix, 10**9)
    found = worker_pool(2).run(digest_on_rank, prefix, cache_from, timeout=120)
    assert found == [expected, expected]
    assert whole_range(prefix).cache.exists() == (cache_from == 1)
