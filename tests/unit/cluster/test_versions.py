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


def test_the_same_everywhere_is_right() -> None:
    assert odd_ones({"a": RIGHT, "b": dict(reversed(RIGHT.items()))}) == {}
    assert odd_ones({"a": RIGHT}) == {}


def test_the_node_that_differs_is_named_with_what_differs() -> None:
    other = {"python": "3.11.9", "torch": "2.12.0", "mlra_scale": "bbb"}
    text = "has mlra_scale bbb instead of aaa, torch 2.12.0 instead of 2.13.0"
    assert odd_ones({"a": other, "b": RIGHT, "c": RIGHT}) == {"a": text}


def test_of_two_the_first_counts_as_right() -> None:
    assert [*odd_ones({"b": RIGHT, "a": {**RIGHT, "torch": "2.12.0"}})] == ["a"]


def test_what_a_node_does_not_know_differs() -> None:
    assert odd_ones({"a": RIGHT, "b": {"python": "3.11.9"}}) == {
        "b": "has mlra_scale None instead of aaa, torch None instead of 2.13.0"
    }


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_most_nodes_are_right(is_odd: list[bool]) -> None:
    found = {f"n{number}": {**RIGHT, "torch": "old"} if odd else RIGHT for number, odd in enumerate(is_odd)}
    named = odd_ones(found)
    minority = sum(is_odd) > len(is_odd) / 2 or (2 * sum(is_odd) == len(is_odd) and is_odd[0])
    assert [*named] == [f"n{number}" for number, odd in enumerate(is_odd) if odd != minority]
