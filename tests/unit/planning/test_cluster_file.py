"""The file of a cluster's measured constants: it comes back equal, and what cannot be is refused in one message."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.config import ConfigError, load_config
from mlra_scale.planning.cluster import Cluster, named_cluster, named_clusters
from mlra_scale.planning.cluster_file import read_cluster_file, write_cluster_file
from tests.support.tools import run_tool

Change = Callable[[dict[str, Any]], Any]


def written(folder: Path, change: Change = lambda content: None) -> Path:
    """A file, with something changed in its content."""
    path = folder / "cluster.json"
    cluster = replace(named_cluster("h100"), name="ours", nodes=4, link_inter=1.5e10)
    write_cluster_file(path, cluster, ["link_inter"])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_every_named_cluster_comes_back_equal(tmp_path: Path) -> None:
    for name, cluster in named_clusters().items():
        write_cluster_file(tmp_path / name, cluster, [])
        assert read_cluster_file(tmp_path / name) == cluster
    assert not list(tmp_path.glob(".*"))


def set_field(name: str, value: Any) -> Change:
    return lambda content: content["cluster"].update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_field("utilization", 1.5), "cluster.utilization = 1.5: must be <= 1.0"),
        (set_field("utilization", 0), "cluster.utilization = 0: must be >= 1e-06"),
        (set_field("link_intra", 0.0), "cluster.link_intra = 0.0: must be >= 1000.0"),
        (set_field("link_intra", "fast"), "cluster.link_intra = 'fast': must be a number, not text"),
        (set_field("link_intra", True), "cluster.link_intra = True: must be a number, not true/false"),
        (set_field("latency_inter", -1e-6), "cluster.latency_inter = -1e-06: must be >= 0.0"),
        (set_field("zero_overhead", [0.0, 1e-4]), "cluster.zero_overhead = [0.0, 0.0001]: has too few values"),
        (set_field("zero_overhead", [0.0, 1e-4, -1.0, 0.0]), "cluster.zero_overhead.2 = -1.0: must be >= 0.0"),
        (set_field("nodes", 0), "cluster.nodes = 0: must be >= 1"),
        (set_field("nodes", 1.5), "cluster.nodes = 1.5: must be an integer"),
        (set_field("runs_ahead", 1), "cluster.runs_ahead = 1: must be true or false"),
        (set_field("name", ""), "cluster.name = '': must be text of 1 to"),
        (set_field("name", "\x1b[2J"), r"cluster.name = '\x1b[2J': must be text of 1 to"),
        (set_field("reserved", 1e12), "cluster.reserved = 1000000000000.0: must be less than cluster.memory"),
        (set_field("link_intre", 1.0), "cluster.link_intre = 1.0: is no field of such a file; did you mean 'link_intr"),
        (lambda content: content["cluster"].pop("memory"), "cluster.memory = None: is missing; write the file anew"),
        (lambda content: content.pop("cluster"), "cluster = None: is missing"),
        (lambda content: content.update(cluster=[]), "cluster = []: must hold the constants"),
        (lambda content: content.update(measured=["speed"]), "measured = ['speed']: must be a list of names"),
        (lambda content: content.update(format="2"), "format = '2': must be 'mlra-scale cluster 1'; write the file"),
        (lambda content: content.clear(), "format = None: must be 'mlra-scale cluster 1'"),
        (lambda content: content.update(extra=1), "extra = 1: is no field of such a file"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: Change, said: str) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ConfigError) as caught:
        read_cluster_file(path)
    assert f"--cluster-file {path}: {said}" in str(caught.value)


def test_every_number_is_checked(tmp_path: Path) -> None:
    for field in fields(Cluster):
        if field.type not in ("Label", "StrictBool") and field.name != "zero_overhead":
            with pytest.raises(ConfigError, match=rf"cluster\.{field.name} = -1"):
                read_cluster_file(written(tmp_path, set_field(field.name, -1)))


@pytest.mark.parametrize("value", [1e-300, 1e300])
def test_finite_numbers_that_no_device_has_are_refused(tmp_path: Path, value: float) -> None:
    """With them a step would take no time, or infinitely long; seconds may be as short as they like."""
    for field in fields(Cluster):
        is_time = any(word in field.name for word in ("latency", "overhead", "launch", "wait"))
        is_number = field.type not in ("Label", "StrictBool", "Count") and field.name != "zero_overhead"
        if is_number and not (value < 1 and is_time):
            with pytest.raises(ConfigError, match=rf"cluster\.{field.name} = "):
                read_cluster_file(written(tmp_path, set_field(field.name, value)))
    if value > 1:
        with pytest.raises(ConfigError, match=r"cluster\.zero_overhead\.3 = 1e\+300: must be <= 1000"):
            read_cluster_file(written(tmp_path, set_field("zero_overhead", [0.0, 0.0, 0.0, value])))


@pytest.mark.parametrize("value", ["0", "-1", "1e6", "1e300"])
def test_memory_of_a_device_that_cannot_be_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.device_memory_gib"):
        load_config("debug", overrides=[f"cluster.device_memory_gib={value}"])


def test_all_that_is_wrong_is_reported_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, lambda content: content["cluster"].update(nodes=0, memory="all", peak=1.0))
    with pytest.raises(ConfigError) as caught:
        read_cluster_file(path)
    assert [problem.field.split(": ")[1] for problem in caught.value.problems] == [
        "cluster.peak",
        "cluster.nodes",
        "cluster.memory",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not valid JSON: line 1, column 2"),
        (b'{"format": 1e999}', "has the number 1e999, which is not finite"),
        (b"[" * 100_000, "is nested more than 64 deep"),
        (b"\xff", "is not UTF-8 text"),
        (b"[]", "must hold a JSON object"),
        (b" " * 2**21, "is larger than 1048576 bytes"),
    ],
)
def test_bytes_that_are_no_such_file_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "cluster.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_cluster_file(path)
    assert "--cluster-file = " in str(caught.value) and said in str(caught.value) and "check.sh" in str(caught.value)


def test_nothing_is_written_that_would_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.link_intra = 0\.0: must be >="):
        write_cluster_file(tmp_path / "cluster.json", replace(named_cluster("cpu"), link_intra=0.0), [])
    assert not (tmp_path / "cluster.json").exists()


def test_the_planner_reads_it(tmp_path: Path) -> None:
    slow = replace(named_cluster("cpu"), name="slow links", source="a test", link_intra=1e5)
    write_cluster_file(tmp_path / "cluster.json", slow, ["link_intra"])
    plans = {}
    for name, *start in (("named", "--cluster", "cpu"), ("file", "--cluster-file", tmp_path / "cluster.json")):
        ran = run_tool("plan", "--preset", "laptop", *start, "--json", tmp_path / "plan.json", "parallel.tensor=2")
        assert ran.code == 0, ran.stderr
        plans[name] = json.loads((tmp_path / "plan.json").read_text())
    assert plans["file"]["cluster"] == json.loads(json.dumps(asdict(slow)))
    assert plans["file"]["layouts"][0]["step_seconds"] > 10 * plans["named"]["layouts"][0]["step_seconds"]
    refused = run_tool("plan", "--preset", "laptop", "--cluster-file", tmp_path / "none.json")
    assert refused.code == 2 and "none.json cannot be read: No such file" in refused.stderr
