"""What follows an attempt: every case a line, and what must hold in all of them as properties."""

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.cluster.job.policy import (
    RETRIED,
    Decision,
    End,
    EndKind,
    decide,
    end_of_ranks,
    in_a_row,
    seconds_before_restart,
)
from mlra_scale.cluster.messages import RankFailure
from mlra_scale.config import ClusterConfig
from mlra_scale.training.exit_codes import ExitCode

KINDS: tuple[EndKind, ...] = get_args(EndKind)
OTHERS = [kind for kind in KINDS if kind not in RETRIED]
kinds = st.sampled_from(KINDS)
histories = st.lists(st.tuples(kinds, st.booleans()), max_size=8)
node_names = st.integers(0, 6).map(lambda number: tuple(f"n{index}" for index in range(number)))


def decided(
    kind: EndKind,
    has_progressed: bool = False,
    earlier: list[tuple[str, bool]] | None = None,
    nodes: tuple[str, ...] = ("a", "b"),
    used: int = 2,
    fitting: tuple[int, ...] = (1, 2, 3, 4),
    is_elastic: bool = False,
    max_failures: int = 3,
    is_stopping: bool = False,
    max_preemptions: int = 10,
) -> Decision:
    cluster = ClusterConfig(elastic=is_elastic, max_failures=max_failures, max_preemptions=max_preemptions)
    ends = [*(earlier or []), (kind, has_progressed)]
    return decide(End(kind, "why"), ends, nodes, used, lambda number: number in fitting, cluster, is_stopping)


FAILURE = ("failed", False)


@pytest.mark.parametrize(
    ("given_", "action", "nodes"),
    [
        ({"kind": "done", "earlier": [FAILURE] * 9, "is_stopping": True, "nodes": ()}, "finish", ()),
        ({"kind": "bad_input"}, "fail", ()),
        ({"kind": "bad_input", "is_stopping": True}, "fail", ()),
        ({"kind": "non_finite", "has_progressed": True}, "fail", ()),
        ({"kind": "export_failed", "has_progressed": True}, "fail", ()),
        ({"kind": "preempted", "earlier": [FAILURE] * 3}, "requeue", ()),  # no end of a row of failures
        ({"kind": "preempted", "earlier": [("preempted", False)] * 9}, "fail", ()),
        ({"kind": "preempted", "earlier": [("preempted", True)] * 20}, "requeue", ()),
        ({"kind": "preempted", "earlier": [("preempted", False)] * 20, "has_progressed": True}, "requeue", ()),
        ({"kind": "failed"}, "restart", ("a", "b")),
        ({"kind": "hung"}, "restart", ("a", "b")),
        ({"kind": "failed", "nodes": ("a", "b", "c")}, "restart", ("a", "b")),
        ({"kind": "failed", "earlier": [FAILURE] * 2}, "fail", ()),
        ({"kind": "failed", "earlier": [FAILURE] * 2, "is_stopping": True}, "fail", ()),
        ({"kind": "failed", "earlier": [FAILURE] * 2, "has_progressed": True}, "restart", ("a", "b")),
        ({"kind": "failed", "earlier": [FAILURE, ("hung", True), FAILURE]}, "restart", ("a", "b")),
        ({"kind": "failed", "earlier": [FAILURE, ("preempted", False), FAILURE]}, "fail", ()),
        ({"kind": "failed", "max_failures": 1, "has_progressed": True}, "restart", ("a", "b")),
        ({"kind": "failed", "is_stopping": True}, "requeue", ()),
        ({"kind": "lost_node", "nodes": ("b",)}, "requeue", ()),
        ({"kind": "bad_node", "nodes": ("b",)}, "requeue", ()),
        ({"kind": "bad_node", "nodes": ("b", "c")}, "restart", ("b", "c")),
        ({"kind": "lost_node", "nodes": ("b",), "is_elastic": True}, "restart", ("b",)),
        ({"kind": "lost_node", "nodes": (), "is_elastic": True}, "requeue", ()),
        ({"kind": "lost_node", "nodes": ("b",), "is_elastic": True, "is_stopping": True}, "requeue", ()),
        # Three nodes are left of four, but the batch divides over two only.
        (
            {"kind": "lost_node", "nodes": ("b", "c", "d"), "used": 4, "fitting": (1, 2, 4), "is_elastic": True},
            "restart",
            ("b", "c"),
        ),
        ({"kind": "lost_node", "nodes": ("b", "c"), "used": 4, "fitting": (4,), "is_elastic": True}, "requeue", ()),
    ],
)
def test_what_follows_an_end(given_: dict, action: str, nodes: tuple[str, ...]) -> None:
    decision = decided(**given_)
    assert (decision.action, decision.nodes) == (action, nodes)
    assert "why" in decision.reason


def test_reasons_name_the_limit_and_the_nodes_that_are_left() -> None:
    reason = decided("failed", earlier=[FAILURE] * 2).reason
    assert reason == "3 failures in a row without a newer checkpoint (cluster.max_failures); last: why"
    reason = decided("lost_node", nodes=("b", "c", "d"), used=4, fitting=(2,), is_elastic=True).reason
    assert reason == "why; continues on 2 of 4 nodes"


@settings(deadline=None)
@given(st.data())
def test_failures_without_progress_end_the_job_after_max_failures(data: st.DataObject) -> None:
    """Whatever lies between them, however many preemptions too, and on whatever nodes."""
    max_failures = data.draw(st.integers(1, 5))
    earlier: list[tuple[str, bool]] = []
    failures = 0
    while True:
        kind = data.draw(st.sampled_from(RETRIED) if len(earlier) >= 12 else st.sampled_from([*RETRIED, "preempted"]))
        failures += kind in RETRIED
        decision = decided(
            kind,
            earlier=earlier,
            nodes=data.draw(node_names),
            used=data.draw(st.integers(1, 6)),
            is_elastic=data.draw(st.booleans()),
            max_failures=max_failures,
            is_stopping=data.draw(st.booleans()),
        )
        earlier.append((kind, False))
        assert (decision.action == "fail") == (failures == max_failures), earlier
        if decision.action == "fail":
            return


@settings(deadline=None)
@given(histories, st.integers(0, 4), st.lists(st.sampled_from(OTHERS), max_size=5))
def test_the_row_begins_after_the_last_checkpoint(
    before: list[tuple[str, bool]], number: int, between: list[str]
) -> None:
    row = [*before, ("preempted", True), *[(kind, False) for kind in between], *[("hung", False)] * number]
    assert in_a_row(row, RETRIED) == number
    assert in_a_row([*row, ("failed", True)], RETRIED) == 0


@settings(deadline=None)
@given(
    kinds, st.booleans(), histories, node_names, st.integers(1, 6), st.sets(st.integers(1, 6)), st.booleans(), st.data()
)
def test_the_rules_that_hold_in_every_case(
    kind: EndKind,
    has_progressed: bool,
    earlier: list[tuple[str, bool]],
    nodes: tuple[str, ...],
    used: int,
    fitting: set[int],
    is_elastic: bool,
    data: st.DataObject,
) -> None:
    is_stopping = data.draw(st.booleans())
    max_failures = data.draw(st.integers(1, 5))
    decision = decided(
        kind, has_progressed, earlier, nodes, used, tuple(fitting), is_elastic, max_failures, is_stopping
    )
    assert (decision.action == "finish") == (kind == "done")
    if kind in ("bad_input", "non_finite"):
        assert decision.action == "fail", "running again gives the same end"
    if kind == "preempted" or is_stopping:
        assert decision.action != "restart"
    if decision.action == "restart":
        assert kind in RETRIED
        assert decision.nodes == nodes[: len(decision.nodes)] and 0 < len(decision.nodes) <= used
        if len(decision.nodes) < used:
            assert is_elastic and len(nodes) < used and len(decision.nodes) in fitting
            assert not any(number in fitting for number in range(len(decision.nodes) + 1, len(nodes) + 1)), "the most"
    else:
        assert decision.nodes == ()


def test_ranks_start_again_at_once_at_first_and_then_later() -> None:
    waits = [seconds_before_restart([FAILURE] * number) for number in range(6)]
    assert waits == [0, 0, 60, 300, 300, 300] and seconds_before_restart([FAILURE, FAILURE, ("failed", True)]) == 0


@pytest.mark.parametrize(
    ("codes", "kind", "bad"),
    [
        ({0: -9, 1: 1}, None, ()),
        ({}, None, ()),
        ({None: 1}, None, ()),  # torchrun itself
        ({0: -9, 1: ExitCode.UNSTABLE}, "unstable", ()),
        ({0: ExitCode.PREEMPTED, 1: ExitCode.NON_FINITE}, "non_finite", ()),
        ({0: -9, 1: ExitCode.PREEMPTED}, "preempted", ()),
        ({0: ExitCode.BAD_INPUT, 1: ExitCode.BAD_INPUT}, "bad_input", ()),
        ({1: ExitCode.BAD_INPUT, 2: -9}, "bad_node", ("n1",)),  # refused where the first node found nothing wrong
        ({1: ExitCode.BAD_INPUT, 3: ExitCode.BAD_INPUT}, "bad_node", ("n1", "n3")),
    ],
)
def test_exit_codes_of_ranks_say_how_an_attempt_ended(
    codes: dict[int | None, int], kind: EndKind | None, bad: tuple[str, ...]
) -> None:
    failures = [
        RankFailure(rank=rank, code=code, time=1.0, message="", node=f"n{rank}") for rank, code in codes.items()
    ]
    end = end_of_ranks(failures, Path("logs"))
    assert (None if end is None else end.kind, () if end is None else tuple(end.bad_nodes)) == (kind, bad)
