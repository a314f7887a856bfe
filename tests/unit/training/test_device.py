import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlra_scale.config import ConfigError, load_config
from mlra_scale.training.start.device import Launcher, _cgroup_limits, check_device, check_launcher, memory_of_node


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_that_the_gpu_only_emulates_is_refused(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    cuda = SimpleNamespace(
        device_count=lambda: 1, get_device_name=lambda: "Tesla V100", is_bf16_supported=is_bf16_supported
    )
    monkeypatch.setattr("torch.cuda", cuda)
    problems = check_device(load_config("debug", overrides=["train.device=cuda", "train.precision=bf16"]))
    assert [problem.field for problem in problems] == ([] if has_bf16 else ["train.precision"])
    assert has_bf16 or "V100 has no bf16; use train.precision=fp16 or fp32" in problems[0].remedy


@pytest.mark.parametrize("folder", ["cpu_adam", "py311_cpu/cpu_adam"])
def test_the_lock_of_a_build_that_was_killed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / folder / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    offloading = ["deepspeed.zero_optimization={stage: 2, offload_optimizer: {device: cpu}}", "train.device=cpu"]
    offloaded, plain = (load_config("debug", overrides=overrides) for overrides in (offloading, offloading[1:]))
    assert check_device(offloaded) == [], "somebody builds it now"
    os.utime(lock, (0, 0))
    (problem,) = check_device(offloaded)
    assert problem.value == str(lock) and "remove it" in problem.remedy
    assert check_device(plain) == [], "which does not load it"


def test_many_processes_that_do_not_know_of_each_other_are_refused() -> None:
    assert check_launcher({}) == check_launcher({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}) == []
    assert check_launcher({"SLURM_NTASKS": "8", "RANK": "3", "WORLD_SIZE": "8"}) == []
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        (problem,) = check_launcher({name: "8"})
        assert problem.field == name and "torchrun" in problem.remedy


def test_the_place_among_ranks_is_that_of_the_launcher() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Launcher.of(environment) == Launcher(5, 16, 1, 4)
    assert Launcher.of({}) == Launcher(0, 1, 0, None)
    assert Launcher.of({"LOCAL_WORLD_SIZE": "8"}).local_world_size == 8, "a plan on a login node"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("x", "-1", "2", "1.0", "")),
        ("WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "-2"),
        ("LOCAL_RANK", "1"),
    ],
)
def test_a_wrong_variable_of_the_launcher_is_one_error_that_names_it(name: str, value: str) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} | {name: value}
    if name == "WORLD_SIZE":
        environment["RANK"] = "0"
    with pytest.raises(ConfigError) as caught:
        Launcher.of(environment)
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == (name, value) and "torchrun" in problem.remedy


def test_the_memory_of_a_node_is_what_a_job_or_a_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = memory_of_node()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert memory_of_node() == 100 * 2**20 < whole
    groups = tmp_path / "sys/fs/cgroup"
    (groups / "job/step").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    (groups / "job/step/memory.max").write_text("max\n")
    (groups / "job/memory.max").write_text("4096\n")
    assert _cgroup_limits(tmp_path) == [4096] and _cgroup_limits(tmp_path / "nothing") == []
