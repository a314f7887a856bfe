"""Bad nodes are named before the first step: by what all ranks found, and over real process groups."""

import contextlib
import errno
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.cluster.rank import preflight
from mlra_scale.cluster.rank.preflight import (
    BadNodes,
    blamed_for_folder,
    blamed_for_sum,
    check_alone,
    check_together,
    unreached_of,
)
from mlra_scale.config import ConfigError
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]
SHARED = "the run directory is not the one that the other nodes have: it must be on a shared file system"


def test_a_device_that_computes_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is off by one in a single element."""
    check_alone("a", 0, "cpu")
    multiply = torch.Tensor.__matmul__

    def wrong(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        product = multiply(first, second)
        if product.is_floating_point():
            product[17, 200] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    with pytest.raises(BadNodes, match=r"^a: cpu of local rank 3 computes wrong$") as caught:
        check_alone("a", 3, "cpu")
    assert [*caught.value.nodes] == ["a"] and not caught.value.is_common


def test_a_device_that_fails_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> bool:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(preflight, "_computes_right", fail)
    with pytest.raises(BadNodes) as caught:
        check_alone("a", 0, "cpu")
    assert caught.value.nodes == {"a": "cpu of local rank 0 fails: CUDA error: uncorrectable ECC error encountered"}


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(BadNodes, match=r"^a: torch sees 3 GPU\(s\), and there is none for local rank 3$"):
        check_alone("a", 3, "cuda")


@settings(deadline=None)
@given(st.data(), st.integers(2, 6), st.integers(1, 3))
def test_nodes_that_share_the_run_directory_with_no_other_are_named(
    data: st.DataObject, number: int, processes: int
) -> None:
    """Whether they see nothing, or are not seen, or both; of nodes that share it with no other, the first is kept."""
    names = "abcdef"[:number]
    apart = data.draw(st.sets(st.sampled_from(names), max_size=number - 1))
    ways = {name: data.draw(st.sampled_from(["blind", "hidden", "both"])) for name in apart}

    def sees(node: str, other: str) -> bool:
        return node == other or (ways.get(node) in (None, "hidden") and ways.get(other) in (None, "blind"))

    nodes = [name for name in names for _ in range(processes)]
    unseen = [[other for other in names if not sees(node, other)] for node in nodes]
    is_first = [nodes.index(node) == rank for rank, node in enumerate(nodes)]
    looked = [others if first else [] for others, first in zip(unseen, is_first, strict=True)]
    others = {frozenset((a, b)) for a in names for b in names if sees(a, b) and sees(b, a) and a != b}
    alone = [name for name in names if not any(name in pair for pair in others)]
    assert blamed_for_folder(nodes, looked) == dict.fromkeys(alone[1:] if len(alone) == number else alone, SHARED)
    assert apart <= {*alone}


@pytest.mark.parametrize(
    ("nodes", "unseen", "named"),
    [
        ("aabb", ["", "", "", ""], ""),
        ("ab", ["b", ""], "b"),  # of two, the second, whichever does not see the other
        ("ab", ["", "a"], "b"),
        ("aabbcc", ["bc", "", "", "", "", ""], "a"),
        ("abc", ["", "a", "a"], "a"),  # the first node sees all others, and none of them sees it
        ("abcd", ["bd", "acd", "bd", "abc"], "bd"),
    ],
)
def test_a_node_that_does_not_share_the_run_directory_is_named(nodes: str, unseen: list[str], named: str) -> None:
    assert blamed_for_folder([*nodes], unseen) == dict.fromkeys(named, SHARED)


def test_a_node_that_does_not_see_some_others_is_named_with_them() -> None:
    found = blamed_for_folder(["a", "b", "c", "d"], ["", "cd", "", ""])
    assert found == {"b": "does not see in the run directory what c, d wrote"}


def four(*values: Any) -> Any:
    """A case of four processes, whose start takes most of the time of these tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def examine(rank: int, world_size: int, plan: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Checks a world with a fault; returns whom this rank blames, and what it printed."""
    patience, reduce = preflight._SECONDS_TO_SEE, dist.all_reduce

    def all_reduce(values: torch.Tensor) -> None:
        if plan.get("loses_its_part") == rank:
            values.zero_()
        reduce(values)
        if plan.get("reads_wrong") == rank:
            values[0] += 1

    found: dict[str, str] = {}
    printed = io.StringIO()
    preflight._SECONDS_TO_SEE, dist.all_reduce = 0.1, all_reduce  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(printed):
            check_together(torch.device("cpu"), plan["nodes"][rank], Path(plan["folders"][rank]))
    except BadNodes as error:
        assert error.is_common
        found = error.nodes
    finally:
        preflight._SECONDS_TO_SEE, dist.all_reduce = patience, reduce
    dist.barrier()
    return found, printed.getvalue()


def world(folder: Path, nodes: Sequence[str], apart: str = "", **faults: int) -> dict[str, Any]:
    """A case of `examine`, with the files that the job and the agents write; one node may have a folder of its own."""
    folders = [folder / ("apart" if node == apart else "shared") for node in nodes]
    for node, path in zip(nodes, folders, strict=True):
        path.mkdir(exist_ok=True)
        (path / "nonce").write_text("abc")
        (path / f"nonce-{node}").write_text("abc")
    return {"nodes": nodes, "folders": [str(path) for path in folders], **faults}


def verdict(results: list[tuple[dict[str, str], str]]) -> dict[str, str]:
    """The verdict of all ranks, which is one."""
    assert all(found == results[0][0] for found, _ in results), results
    return results[0][0]


@pytest.mark.parametrize("nodes", [["a", "b"], ["a", "a"], four(["a", "a", "b", "b"]), four(["a", "b", "c", "d"])])
def test_good_nodes_pass(tmp_path: Path, worker_pool: Pools, nodes: list[str]) -> None:
    results = worker_pool(len(nodes)).run(examine, world(tmp_path, nodes), timeout=30.0)
    assert verdict(results) == {}
    printed = [text for _, text in results]
    assert printed[1:] == [""] * (len(nodes) - 1)
    assert printed[0].startswith(f"checks passed: {len(nodes)} rank(s) on {len(set(nodes))} node(s), cpu; a sum of 4 ")


@pytest.mark.parametrize(
    ("nodes", "apart", "named"),
    [
        (["a", "b"], "b", "b"),
        (["a", "b"], "a", "b"),
        four(["a", "a", "b", "b"], "b", "b"),
        four(["a", "b", "c", "d"], "a", "a"),
        four(["a", "b", "b", "c"], "b", "b"),
    ],
)
def test_a_node_with_a_folder_of_its_own_is_named(
    tmp_path: Path, worker_pool: Pools, nodes: list[str], apart: str, named: str
) -> None:
    """Though files of an earlier attempt are there."""
    plan = world(tmp_path, nodes, apart)
    for folder in {*plan["folders"]}:
        for node in {*nodes} - {path.name.removeprefix("nonce-") for path in Path(folder).iterdir()}:
            (Path(folder) / f"nonce-{node}").write_text("earlier")
    assert verdict(worker_pool(len(nodes)).run(examine, plan, timeout=30.0)) == {named: SHARED}


@pytest.mark.parametrize("nodes", [["a", "b"], four(["a", "a", "b", "b"])])
def test_a_rank_that_reads_a_wrong_sum_is_named(tmp_path: Path, worker_pool: Pools, nodes: list[str]) -> None:
    plan = world(tmp_path, nodes, reads_wrong=len(nodes) - 1)
    found = verdict(worker_pool(len(nodes)).run(examine, plan, timeout=30.0))
    assert found == {"b": f"rank {len(nodes) - 1} got a wrong sum, and others the right one"}


@pytest.mark.slow
def test_a_rank_whose_part_is_missing_in_the_sum_is_named(tmp_path: Path, worker_pool: Pools) -> None:
    plan = world(tmp_path, ["a", "b", "c", "d"], loses_its_part=2)
    found = verdict(worker_pool(4).run(examine, plan, timeout=30.0))
    assert found == {"c": "a sum over all ranks has a wrong part of rank 2"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ([[], [], [], []], []),
        ([[1], [1], [1], [1]], ["a"]),
        ([[1, 2], [1, 2], [1, 2], [1, 2]], ["a", "b"]),
        ([[], [], [0, 1], []], ["b"]),
        ([[], [3], [3], []], ["a", "b"]),
    ],
)
def test_who_is_to_blame_for_a_wrong_sum(wrong: list[list[int]], named: list[str]) -> None:
    assert sorted(blamed_for_sum(["a", "a", "b", "b"], wrong)) == named


def meet_over(rank: int, world_size: int, interface: str, folder: str, only: int | None = None) -> list[str]:
    """Checks a world whose ranks, or one, are to connect over an interface; returns what is wrong with what."""
    before, seconds = os.environ["GLOO_SOCKET_IFNAME"], preflight._GLOO_SECONDS
    preflight._GLOO_SECONDS = 5.0 if only is None else 3.0
    if only in (None, rank):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        check_together(torch.device("cpu"), f"n{rank}", Path(folder))
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    except BadNodes as error:
        assert error.is_common
        return [str(error)]
    finally:
        os.environ["GLOO_SOCKET_IFNAME"], preflight._GLOO_SECONDS = before, seconds
    return []


def test_an_interface_over_which_gloo_does_not_connect_is_named(tmp_path: Path, worker_pool: Pools) -> None:
    """No node is to blame: on all ranks one message names the variable to set."""
    tmp_path = Path(world(tmp_path, ["n0", "n1"])["folders"][0])
    first, second = worker_pool(2).run(meet_over, "missing0", str(tmp_path), timeout=60.0)
    assert first == second and len(first) == 1
    assert first[0].startswith("GLOO_SOCKET_IFNAME") and "missing0" in first[0] and "n0 reports: " in first[0]
    assert worker_pool(2).run(meet_over, "lo", str(tmp_path), timeout=60.0) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 2])
def test_one_node_that_gloo_does_not_reach_is_named(tmp_path: Path, worker_pool: Pools, bad: int) -> None:
    """All ranks fail to connect; the job can do without one node."""
    tmp_path = Path(world(tmp_path, ["n0", "n1", "n2", "n3"])["folders"][0])
    results = worker_pool(4).run(meet_over, "missing0", str(tmp_path), bad, timeout=120.0)
    assert results == [results[0]] * 4 and len(results[0]) == 1
    assert results[0][0].startswith(f"n{bad}: gloo does not connect it with other nodes") and ";" not in results[0][0]
    assert worker_pool(4).run(meet_over, "lo", str(tmp_path), timeout=60.0) == [[]] * 4


@pytest.mark.parametrize("number", [3, 4, 5, 8, 9])
def test_pairs_of_nodes_tell_which_are_not_reached(number: int) -> None:
    nodes = [f"n{node}" for node in range(number)]
    for bad in ({"n0"}, {"n1"}, {nodes[-1]}, set(nodes), {"n0", "n1"} if number > 4 else {"n2"}):

        def connect(pairs: Sequence[tuple[str, str]], bad: set[str] = bad) -> list[bool]:
            assert len({node for pair in pairs for node in pair}) == 2 * len(pairs), "disjoint"
            return [not bad & {*pair} for pair in pairs]

        assert set(unreached_of(nodes, connect)) == (bad if len(bad) < number else set())
    assert unreached_of(nodes, lambda pairs: [True] * len(pairs)) == []
    assert unreached_of(["n0"], lambda pairs: []) == [] == unreached_of(["n0", "n1"], lambda pairs: [False])


def test_a_folder_that_cannot_be_listed_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(preflight, "_SECONDS_TO_SEE", 0.2)
    monkeypatch.setattr(os, "listdir", refuse)
    assert sorted(preflight._unseen_nodes(tmp_path, ["a", "b"])) == ["a", "b"]
