"""Bad nodes are named before the first step: by what all ranks found, and over real process groups."""

import contextlib
import errno
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.cluster import preflight
from mlra_scale.cluster.preflight import BadNodes, blamed, blamed_for_sum, check_alone, check_together, unreached_of
from mlra_scale.config import ConfigError
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]
SHARED = "the run directory is not the one that the other nodes have: it must be on a shared file system"


def test_a_device_that_computes_right_passes() -> None:
    check_alone("a", 0, "cpu")


def test_a_device_that_computes_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is off by one in a single element."""
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


def views(nodes: Sequence[str], sees: Callable[[str, str], bool]) -> list[str]:
    """What each rank tells of the nodes that it does not see."""
    everyone = dict.fromkeys(nodes)
    return [",".join(other for other in everyone if other != node and not sees(node, other)) for node in nodes]


worlds = st.integers(2, 6).flatmap(
    lambda number: st.tuples(st.just([f"n{node}" for node in range(number)]), st.integers(1, 3))
)


@settings(deadline=None)
@given(worlds, st.data())
def test_exactly_one_unshared_node_is_named(world: tuple[list[str], int], data: st.DataObject) -> None:
    """Whether it sees nothing, or is not seen, or both; of two that do not see each other, the second."""
    names, processes = world
    nodes = [node for node in names for _ in range(processes)]
    bad = data.draw(st.sampled_from(names))
    is_blind, is_hidden = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))

    def sees(node: str, other: str) -> bool:
        return not (is_blind and node == bad) and not (is_hidden and other == bad)

    found = blamed(nodes, [""] * len(nodes), views(nodes, sees))
    expected = bad if len(names) > 2 else "n1"
    assert found == {expected: SHARED}


@settings(deadline=None)
@given(worlds, st.data())
def test_a_fault_of_its_own_comes_before_what_others_do_not_see(
    world: tuple[list[str], int], data: st.DataObject
) -> None:
    names, processes = world
    nodes = [node for node in names for _ in range(processes)]
    faulty = data.draw(st.sets(st.integers(0, len(nodes) - 1), min_size=1))
    faults = ["cannot write" if rank in faulty else "" for rank in range(len(nodes))]
    unseen = views(nodes, lambda node, other: data.draw(st.booleans()))
    assert blamed(nodes, faults, unseen) == {nodes[rank]: "cannot write" for rank in faulty}


@settings(deadline=None)
@given(worlds, st.data())
def test_blame_is_for_those_who_do_not_see_or_are_not_seen(world: tuple[list[str], int], data: st.DataObject) -> None:
    """Never for nobody, where somebody does not see something; and always for nodes of this job."""
    names, processes = world
    nodes = [node for node in names for _ in range(processes)]
    pairs = {(a, b): data.draw(st.booleans()) for a in names for b in names if a != b}
    unseen = views(nodes, lambda node, other: pairs[node, other])
    found = blamed(nodes, [""] * len(nodes), unseen)
    assert set(found) <= set(names)
    assert bool(found) == any(unseen)
    innocent = {node for node in names if all(pairs[node, b] and pairs[b, node] for b in names if b != node)}
    assert not innocent & set(found)
    assert blamed(nodes, [""] * len(nodes), unseen) == found


def test_who_sees_half_of_the_nodes_is_told_with_what_it_does_not_see() -> None:
    nodes = ["a", "b", "c", "d"]
    assert blamed(nodes, [""] * 4, ["", "d,c", "", ""]) == {"b": "does not see in the run directory what c, d wrote"}


def test_nobody_is_blamed_where_all_is_well() -> None:
    assert blamed(["a", "b"], ["", ""], ["", ""]) == {}


def four(*values: Any) -> Any:
    """A case of four processes, whose start takes most of the time of these tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def examine(rank: int, world_size: int, plan: dict[str, Any]) -> tuple[dict[str, str], str, float, list[str]]:
    """Checks a world with a trouble; returns whom this rank blames, what it printed, for how long, and what is left."""
    patience, reduce = preflight._SECONDS_TO_SEE, dist.all_reduce
    shared = Path(plan.get("folders", [plan["folder"]] * world_size)[rank])

    def all_reduce(values: torch.Tensor) -> None:
        if plan.get("loses_its_part") == rank:
            values.zero_()
        reduce(values)
        if plan.get("reads_wrong") == rank:
            values[0] += 1

    def refuse(path: Path, text: str, **options: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    found: dict[str, str] = {}
    printed = io.StringIO()
    started = time.monotonic()
    preflight._SECONDS_TO_SEE, dist.all_reduce = 0.1, all_reduce  # type: ignore[assignment]
    write = Path.write_text
    try:
        if plan.get("cannot_write") == rank:
            Path.write_text = refuse  # type: ignore[assignment, method-assign]
        with contextlib.redirect_stdout(printed):
            check_together(torch.device("cpu"), plan["nodes"][rank], shared)
    except BadNodes as error:
        assert error.is_common
        found = error.nodes
    finally:
        preflight._SECONDS_TO_SEE, dist.all_reduce = patience, reduce
        Path.write_text = write  # type: ignore[method-assign]
    seconds = time.monotonic() - started
    dist.barrier()
    left = sorted(path.name for path in shared.iterdir()) if shared.is_dir() else []
    return found, printed.getvalue(), seconds, left


def verdicts(results: list[tuple[dict[str, str], str, float, list[str]]]) -> dict[str, str]:
    """The verdict of all ranks, which is one, and leaves nothing behind."""
    assert all(found == results[0][0] and left == [] for found, _, _, left in results), results
    return results[0][0]


@pytest.mark.parametrize("nodes", [["a", "b"], ["a", "a"], four(["a", "a", "b", "b"]), four(["a", "b", "c", "d"])])
def test_good_nodes_pass(tmp_path: Path, worker_pool: Pools, nodes: list[str]) -> None:
    results = worker_pool(len(nodes)).run(examine, {"nodes": nodes, "folder": str(tmp_path)}, timeout=30.0)
    assert verdicts(results) == {}
    printed = [text for _, text, _, _ in results]
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
    folders = [tmp_path / ("apart" if node == apart else "shared") for node in nodes]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    plan = {"nodes": nodes, "folders": [str(folder) for folder in folders], "folder": ""}
    assert verdicts(worker_pool(len(nodes)).run(examine, plan, timeout=30.0)) == {named: SHARED}


@pytest.mark.parametrize("nodes", [["a", "b"], four(["a", "a", "b", "b"])])
def test_a_rank_that_reads_a_wrong_sum_is_named(tmp_path: Path, worker_pool: Pools, nodes: list[str]) -> None:
    plan = {"nodes": nodes, "folder": str(tmp_path), "reads_wrong": len(nodes) - 1}
    found = verdicts(worker_pool(len(nodes)).run(examine, plan, timeout=30.0))
    assert found == {"b": f"rank {len(nodes) - 1} got a wrong sum, and others the right one"}


@pytest.mark.slow
def test_a_rank_whose_part_is_missing_in_the_sum_is_named(tmp_path: Path, worker_pool: Pools) -> None:
    plan = {"nodes": ["a", "b", "c", "d"], "folder": str(tmp_path), "loses_its_part": 2}
    assert verdicts(worker_pool(4).run(examine, plan, timeout=30.0)) == {
        "c": "a sum over all ranks has a wrong part of rank 2"
    }


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
    first, second = worker_pool(2).run(meet_over, "missing0", str(tmp_path), timeout=60.0)
    assert first == second and len(first) == 1
    assert first[0].startswith("GLOO_SOCKET_IFNAME") and "missing0" in first[0] and "n0 says: " in first[0]
    assert worker_pool(2).run(meet_over, "lo", str(tmp_path), timeout=60.0) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 2])
def test_one_node_that_gloo_does_not_reach_is_named(tmp_path: Path, worker_pool: Pools, bad: int) -> None:
    """All ranks fail to connect; the job can do without one node."""
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


def test_tokens_of_an_earlier_attempt_are_not_taken_for_these(tmp_path: Path, worker_pool: Pools) -> None:
    folders = [tmp_path / "shared", tmp_path / "apart"]
    for folder in folders:
        folder.mkdir()
        (folder / ".seen-00000").write_text("z\n")
        (folder / ".seen-00001").write_text("z\n")
    plan = {"nodes": ["a", "b"], "folders": [str(folder) for folder in folders], "folder": ""}
    results = worker_pool(2).run(examine, plan, timeout=30.0)
    assert [found for found, *_ in results] == [{"b": SHARED}] * 2


@pytest.mark.parametrize("nodes", [["a", "b"], four(["a", "b", "c", "d"])])
def test_a_node_that_cannot_write_is_named(tmp_path: Path, worker_pool: Pools, nodes: list[str]) -> None:
    plan = {"nodes": nodes, "folder": str(tmp_path), "cannot_write": 1}
    found = verdicts(worker_pool(len(nodes)).run(examine, plan, timeout=30.0))
    assert found == {"b": f"cannot write to {tmp_path}: No space left on device"}


def test_a_folder_that_cannot_be_listed_is_one_that_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(preflight, "_SECONDS_TO_SEE", 0.2)
    monkeypatch.setattr(os, "listdir", refuse)
    assert sorted(preflight._unseen_token(tmp_path, ["a", "b"]).split(",")) == ["a", "b"]
