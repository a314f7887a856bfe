"""The callback of transformers' Trainer on two processes: DDP, and DeepSpeed through accelerate."""

from pathlib import Path

import pytest

from tests.support.processes import Program, torchrun


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ddp", "1", "2", "3"])
def test_the_trainer_of_transformers_on_two_processes(tmp_path: Path, stage: str) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    command = torchrun(2, "-m", "tests.processes.api.sharded")
    program = Program([*command, str(tmp_path / "out"), stage], tmp_path / "log")
    assert program.wait() == 0, program.output()
