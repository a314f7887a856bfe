from types import SimpleNamespace

import pytest

from mlra_scale.config import load_config
from mlra_scale.training.launch import check_device, check_launcher


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


@pytest.mark.parametrize(
    ("environment", "is_refused"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"SLURM_NTASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"SLURM_NTASKS": "8", "RANK": "3", "WORLD_SIZE": "8"}, False),
    ],
)
def test_many_processes_that_do_not_know_of_each_other_are_refused(
    environment: dict[str, str], is_refused: bool
) -> None:
    problems = check_launcher(environment)
    assert len(problems) == is_refused
    for problem in problems:
        assert problem.field in environment and "torchrun" in problem.remedy
