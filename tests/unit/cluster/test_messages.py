"""Messages of nodes and ranks: none ends the job, and what the job uses of them is bounded and printable."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlra_scale.cluster.channel import Heard, Hub
from mlra_scale.cluster.job.attempt import AttemptRunner
from mlra_scale.cluster.job.policy import EndKind
from mlra_scale.cluster.job.step import AttemptPlan
from mlra_scale.cluster.messages import NodeMessage, RankFailure, RankMessage, printable
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.config import ClusterConfig

HEARTBEAT: dict[str, Any] = {"rank": 3, "local_rank": 1, "pid": 7, "phase": "training", "step": 4, "seconds": 0.5}
HEARTBEAT |= {"location": "f (x.py:1)"}
RANK = {"heartbeat": HEARTBEAT, "silence": 0, "state": "sleeping"}
FAILURE: dict[str, Any] = {"rank": None, "code": 1, "time": 100.5, "message": "torchrun: odd"}


class QuietHub(Hub):
    """Hears what a test gives it, and sends nothing."""

    def __init__(self, heard: list[Heard]) -> None:
        self._messages = heard

    def poll(self, seconds: float) -> list[Heard]:
        """See Hub."""
        return self._messages

    def send(self, message: dict[str, Any]) -> None:
        """See Hub."""


def attempt(said: list[str]) -> AttemptRunner:
    plan = AttemptPlan(
        nodes=("a", "b"),
        here="a",
        addresses={},
        training=(),
        logs=Path("logs"),
        settings=LauncherSettings(1, "cpu", (), ("python3",)),
        cluster=ClusterConfig(),
        hang_seconds=30.0,
    )
    return AttemptRunner(plan, lambda output: None, said.append, lambda: False, lambda: None)


def take(*messages: Any) -> tuple[str, str, Any, list[str]]:
    """Lets an attempt hear messages of node a, and judges it; returns the end and what it said."""
    said: list[str] = []
    running = attempt(said)
    for message in messages:
        hub = QuietHub([Heard("a", message)])
        running._hear(hub, 0.0)
        running._watch(hub)
    end = running._judge(1)
    return end.kind, end.reason, end.bad_nodes, said


def test_messages_are_read() -> None:
    message = NodeMessage.of(
        {"node": "a", "pid": 5, "versions": {"torch": "2"}, "ranks": [RANK], "bad_nodes": {"b": "ECC"}, "more": [1]}
    )
    assert message.versions == {"torch": "2"} and message.bad_nodes == {"b": "ECC"} and message.failures is None
    assert message.ranks is not None and message.ranks[0].silence == 0.0
    assert message.ranks[0].heartbeat.model_dump() == HEARTBEAT
    assert NodeMessage.of({"failures": [FAILURE]}).failures == [RankFailure(**FAILURE)]
    assert RankMessage.of({"heartbeat": HEARTBEAT}).heartbeat is not None


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"versions": 5}, "versions"),
        ({"versions": {"torch": [1]}}, "versions.torch"),
        ({"ranks": {}}, "ranks"),
        ({"ranks": [{**RANK, "silence": "long"}]}, "ranks.0.silence"),
        ({"ranks": [{**RANK, "silence": math.nan}]}, "ranks.0.silence"),
        ({"ranks": [{**RANK, "silence": math.inf}]}, "ranks.0.silence"),
        ({"ranks": [{**RANK, "heartbeat": {**HEARTBEAT, "step": "4"}}]}, "ranks.0.heartbeat.step"),
        ({"ranks": [{**RANK, "heartbeat": {**HEARTBEAT, "step": 10**400}}]}, "ranks.0.heartbeat.step"),
        ({"ranks": [{**RANK, "heartbeat": {**HEARTBEAT, "pid": 0}}]}, "ranks.0.heartbeat.pid"),
        ({"ranks": [{**RANK, "heartbeat": {**HEARTBEAT, "pid": True}}]}, "ranks.0.heartbeat.pid"),
        ({"bad_nodes": ["b"]}, "bad_nodes"),
        ({"bad_nodes": {"x": "of another job"}}, "bad_nodes"),
        ({"failures": {}}, "failures"),
        ({"failures": [{**FAILURE, "code": None}]}, "failures.0.code"),
        ({"failures": [], "bad_nodes": {"x,y": "of another job"}}, "bad_nodes"),
        ({"signalled": "yes"}, "signalled"),
    ],
)
def test_a_message_of_the_wrong_form_is_named_once_and_not_used(message: dict[str, Any], where: str) -> None:
    kind, _, bad_nodes, said = take(message, message)
    assert kind == "failed" and bad_nodes == {}
    assert len(said) == 1 and said[0].startswith(f"a sent a message that is not understood: {where}")


def test_texts_are_printable_and_short() -> None:
    assert printable("a\x1b[31m \n\t b \ud800\u0000") == "a?[31m b ??"
    assert NodeMessage.of({"bad_nodes": {"b": "x" * 10**6}}).bad_nodes == {"b": "x" * 2000}
    *_, said = take({"bad_nodes": {"b": "\x1b]0;title\x07\ud800"}})
    assert said == ["bad node b: ?]0;title??"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def spoiled(value: Any) -> st.SearchStrategy[Any]:
    """The value, or with some of its parts replaced by whatever JSON can hold."""
    if isinstance(value, dict):
        whole: st.SearchStrategy[Any] = st.fixed_dictionaries({key: spoiled(item) for key, item in value.items()})
    elif isinstance(value, list):
        whole = st.tuples(*map(spoiled, value)).map(list)
    else:
        whole = st.just(value)
    return st.one_of(whole, whole, whole, json_values)


WHOLE = {
    "versions": {"torch": "2.13.0"},
    "ranks": [RANK],
    "signalled": True,
    "bad_nodes": {"b": "ECC"},
    "failures": [FAILURE, {**FAILURE, "rank": 1, "code": -9}],
}
messages = st.lists(
    st.sets(st.sampled_from(sorted(WHOLE)), min_size=1, max_size=2).flatmap(
        lambda keys: spoiled({key: WHOLE[key] for key in keys})
    ),
    max_size=3,
)


@settings(max_examples=80, deadline=None)
@given(messages)
@example([{"bad_nodes": {"b": ""}}])
def test_no_message_of_a_node_ends_the_job(said: list[Any]) -> None:
    """And its verdict can be written into job.json and onto a console."""
    as_sent = [json.loads(json.dumps(message)) for message in said if isinstance(message, dict)]
    kind, reason, bad_nodes, printed = take(*as_sent)
    assert kind in get_args(EndKind)
    assert set(bad_nodes) <= {"a", "b"}
    for text in (reason, *bad_nodes.values(), *printed):
        assert text.encode("utf-8") and text.isprintable()


@settings(max_examples=50, deadline=None)
@given(spoiled({"heartbeat": HEARTBEAT, "bad_nodes": {"a": "ECC"}}))
def test_no_message_of_a_rank_ends_its_node(said: Any) -> None:
    if isinstance(said, dict):
        with contextlib.suppress(ValueError):
            RankMessage.of(json.loads(json.dumps(said)))


@pytest.mark.parametrize(
    ("code", "message", "text"),
    [
        (1, "ValueError: x", "rank 3 on a ended with exit code 1 (FAILED): ValueError: x"),
        (1, "", "rank 3 on a ended with exit code 1 (FAILED)"),
        (5, "SystemExit", "rank 3 on a ended with exit code 5 (PREEMPTED)"),
        (17, "x", "rank 3 on a ended with exit code 17 (unknown)"),
        (-11, "", "rank 3 on a was killed by SIGSEGV"),
        (-40, "", "rank 3 on a was killed by signal 40"),
    ],
)
def test_the_end_of_a_rank_in_words(code: int, message: str, text: str) -> None:
    assert str(RankFailure(rank=3, code=code, time=0.0, message=message, node="a")) == text
