"""What must be the same on all nodes."""

import importlib.metadata
import platform
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.cluster import versions as module
from mlra_scale.cluster.versions import odd_ones, versions

RIGHT = {"python": "3.11.9", "torch": "2.13.0", "mlra_scale": "aaa"}


def test_versions_are_those_of_this_environment() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found == versions() and all(found.values())


def test_a_missing_library_is_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIBRARIES", ("torch", "no-such-library-of-ours"))
    assert versions()["no-such-library-of-ours"] == "missing"


def test_the_digest_knows_every_file_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mlra_scale"
    (package / "cluster").mkdir(parents=True)
    (package / "model").mkdir()
    (package / "model" / "block.py").write_text("a = 1\n")
    shutil.copy(module.__file__, package / "cluster" / "versions.py")
    monkeypatch.setattr(module, "__file__", str(package / "cluster" / "versions.py"))
    digests = [versions()["mlra_scale"]]
    (package / "model" / "block.py").write_text("a = 2\n")
    digests.append(versions()["mlra_scale"])
    (package / "model" / "block.py").rename(package / "model" / "blocks.py")
    digests.append(versions()["mlra_scale"])
    (package / "model" / "notes.txt").write_text("of no importance\n")
    assert len(set(digests)) == 3 and versions()["mlra_scale"] == digests[-1]


def test_the_node_that_differs_is_named_with_what_differs() -> None:
    other = {"python": "3.11.9", "torch": "2.12.0", "mlra_scale": "bbb"}
    text = "has mlra_scale bbb instead of aaa, torch 2.12.0 instead of 2.13.0"
    assert odd_ones({"a": other, "b": RIGHT, "c": RIGHT}, other) == {"a": text}


def test_of_two_the_first_is_right_where_the_job_knows_neither() -> None:
    """Its interpreter is the host's, and theirs that of a container."""
    assert [*odd_ones({"b": RIGHT, "a": {**RIGHT, "torch": "2.12.0"}}, {"python": "3.12.1"})] == ["a"]


def test_what_a_node_does_not_have_differs() -> None:
    assert odd_ones({"a": RIGHT, "b": {"python": "3.11.9"}}, RIGHT) == {
        "b": "has mlra_scale None instead of aaa, torch None instead of 2.13.0"
    }
    assert odd_ones({"a": RIGHT, "b": dict(reversed(RIGHT.items()))}, RIGHT) == {}, "the order does not count"


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.booleans())
def test_most_nodes_are_right(is_odd: list[bool], is_job_odd: bool) -> None:
    """Where there is no majority, those that are like the job are."""
    odd = {**RIGHT, "torch": "old"}
    found = {f"n{number}": odd if is_that else RIGHT for number, is_that in enumerate(is_odd)}
    balance = 2 * sum(is_odd) - len(is_odd)
    is_odd_right = balance > 0 or (balance == 0 and is_job_odd)
    named = odd_ones(found, odd if is_job_odd else RIGHT)
    assert [*named] == [f"n{number}" for number, is_that in enumerate(is_odd) if is_that != is_odd_right]
