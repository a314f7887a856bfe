"""The TEV hook over real process groups: synthetic fragments, cut anywhere and given to any rank."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mlra_scale.config import ModelConfig, TevConfig
from mlra_scale.model.parameters import ParameterTable
from tests.support.pool import Pools

HIDDEN = 24
VOCABULARY = 50257
MODEL = ModelConfig(num_layers=1, hidden_size=HIDDEN, num_heads=2, vocab_size=VOCABULARY)
ROWS = MODEL.padded_vocab_size


def global_matrix() -> np.ndarray:
    """Rows of several scales and means, constant ones among them, and a padding that must not be counted."""
    generator = np.random.default_rng(7)
    matrix = generator.standard_normal((ROWS, HIDDEN)) * generator.uniform(0.5, 2.0, (ROWS, 1))
    matrix[::5] += 1e4
    matrix[::7] = matrix[::7, :1]
    matrix[VOCABULARY:] = 1e9
    return matrix.astype(np.float32)


def owned_parts(world_size: int, tensor: int, seed: int) -> list[list[tuple[int, int]]]:
    """For each rank, the (start, stop) runs that it owns of its tensor shard; three ranks share some row if they can.

    Data ranks that hold the same shard get alternating runs, some of them empty.
    """
    generator = np.random.default_rng(seed)
    size = ROWS // tensor * HIDDEN
    runs: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
    for tensor_rank in range(tensor):
        holders = list(range(tensor_rank, world_size, tensor))
        inside_a_row = 3 * HIDDEN + np.array([2, 9, 20])
        cuts = sorted({0, size, *inside_a_row.tolist(), *generator.integers(0, size, 5).tolist()})
        for i, run in enumerate(itertools.pairwise(cuts)):
            runs[holders[i % len(holders)]].append(run)
    return runs


def measure(rank: int, world_size: int, tensor: int, seed: int, options: dict[str, Any]) -> tuple[Any, int]:
    from mlra_scale.parallel.fragments import Fragment
    from mlra_scale.stability.tev import TevHook

    topology: Any = SimpleNamespace(tensor=tensor, tensor_rank=rank % tensor, device=torch.device("cpu"))
    hook = TevHook(ParameterTable(MODEL), topology, TevConfig(**options), VOCABULARY)
    local = torch.from_numpy(global_matrix()).chunk(tensor)[rank % tensor].flatten()
    fragments = [
        Fragment("embedding.weight", start, local[start:stop])
        for start, stop in owned_parts(world_size, tensor, seed)[rank]
    ]
    fragments.append(Fragment("positions.weight", 0, torch.full((5,), torch.nan)))
    calls = 0
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor")}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    try:
        for name, function in originals.items():
            setattr(dist, name, counted(function))
        return hook.measure(fragments), calls
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


@pytest.mark.slow_except("1-1", "2-1", "4-2")
@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_any_owner_of_any_run(worker_pool: Pools, world_size: int, tensor: int) -> None:
    matrix = global_matrix()[:VOCABULARY].astype(np.float64)
    tev = matrix.std(axis=1)
    close = {"rtol": 1e-12, "atol": 1e-12 * np.abs(matrix).max()}
    for seed in range(2):
        results = worker_pool(world_size).run(measure, tensor, seed, {"extremes": 5})
        statistics, calls = results[0]
        assert all(result == (statistics, calls) for result in results), "ranks disagree"
        assert calls == 3
        assert statistics.num_tokens == VOCABULARY
        np.testing.assert_allclose([statistics.mean, statistics.std], [tev.mean(), tev.std()], **close)
        np.testing.assert_allclose(list(statistics.quantiles.values()), np.quantile(tev, [0.05, 0.25, 0.5, 0.75, 0.95]))
        np.testing.assert_allclose(statistics.mean_embedding_norm, np.linalg.norm(matrix.mean(axis=0)), **close)
        np.testing.assert_allclose(statistics.mean_row_rms, np.sqrt((matrix**2).mean(axis=1)).mean(), **close)
        assert statistics.lowest == [(token, 0.0) for token in range(0, 35, 7)]
        highest = np.argsort(-tev)[:5]
        assert [token for token, _ in statistics.highest] == highest.tolist()


def test_without_quantiles_and_extremes(worker_pool: Pools) -> None:
    tev = global_matrix()[:VOCABULARY].astype(np.float64).std(axis=1)
    statistics, _ = worker_pool(2).run(measure, 1, 0, {"quantiles": ()})[1]
    np.testing.assert_allclose([statistics.mean, statistics.std], [tev.mean(), tev.std()], rtol=1e-11)
    assert statistics.quantiles == {} and statistics.highest == statistics.lowest == []


def measure_alone(rank: int, world_size: int) -> tuple[Any, Any]:
    from mlra_scale.stability.tev import tev_of_matrix

    dist.destroy_process_group()
    options = {"quantiles": (0.5,), "extremes": 2}
    plain = tev_of_matrix(global_matrix(), VOCABULARY, quantiles=(0.5,), extremes=2)
    return measure(0, 1, 1, 1, options)[0], plain


def test_without_a_process_group(worker_pool: Pools) -> None:
    (hooked, plain), *_ = worker_pool(1).run(measure_alone)
    assert hooked.mean == pytest.approx(plain.mean, rel=1e-13) and hooked.quantiles.keys() == {0.5}
    assert hooked.lowest == plain.lowest
