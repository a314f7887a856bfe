"""What would make a job refuse to start, all of it at once; tests/slurm has the launcher's own call."""

import fcntl
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlra_scale.cluster.check import main, read_output
from mlra_scale.cluster.job_file import JobFile
from mlra_scale.config import load_config
from mlra_scale.training.log import tensorboard_log

Capture = pytest.CaptureFixture[str]


def check(capsys: Capture, *training: str, nodes: int = 1, gpus: int = 1) -> tuple[int, str]:
    """Checks as on a login node; returns the exit code and what was printed."""
    code = main([f"--nodes={nodes}", f"--gpus-per-node={gpus}", "--", "--preset", "debug", *training])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_everything_is_reported_at_once(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "job.json").write_text("{")
    overrides = ("parallel.world_size=64", "parallel.tensor=3")
    code, said = check(capsys, "--run-dir", str(run), "--resume", "auto", *overrides, nodes=2)
    assert code == 2 and said.startswith("mlra_scale.cluster.check: bad input\n  ")
    for part in ("parallel.world_size = 64", "job.json", "--resume = 'auto'", "parallel.tensor", "data.path"):
        assert part in said, said
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "job.json"]


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("train.stops=5", "train.stops"),
        ("cluster.step_memory=lots", "cluster.step_memory"),
        ("cluster.step_memory=-1", "cluster.step_memory"),
        ("cluster.cpu_bind=cores", "cluster.cpu_bind"),
        ("data.path=/nowhere", "/nowhere"),
    ],
)
def test_a_field_is_named(tmp_path: Path, capsys: Capture, argument: str, field: str) -> None:
    code, said = check(capsys, "--run-dir", str(tmp_path / "run"), argument)
    assert code == 2 and field in said
    assert not (tmp_path / "run").exists()


def test_a_wrong_number_of_processes_is_named(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCESSES_PER_NODE", "all")
    code, said = check(capsys)
    assert code == 2 and "PROCESSES_PER_NODE" in said


@pytest.mark.parametrize("name", [".lock", ".job.lock"])
def test_a_run_at_work_is_named(tmp_path: Path, capsys: Capture, name: str) -> None:
    with (tmp_path / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, said = check(capsys, "--run-dir", str(tmp_path))
    assert code == 2 and "another run is at work here" in said
    assert "another run" not in check(capsys, "--run-dir", str(tmp_path))[1]


def test_gpus_are_not_looked_for_on_a_login_node_nor_an_outer_job(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell may be one of a job with other GPUs, started by srun."""
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_GPUS": "0", "SLURM_GPUS_ON_NODE": "3"}.items():
        monkeypatch.setenv(name, value)
    code, said = check(capsys, "--run-dir", str(tmp_path), "train.global_batch_size=16", nodes=4, gpus=2)
    assert code == 2 and said.count("\n  ") == 1 and "data.path" in said, said


def test_in_a_job_the_device_is_looked_for(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    JobFile(tmp_path / "job.json").write()
    arguments = ["--nodes=1", "--processes=1", "--device=cuda", "--", "--preset", "debug", "--run-dir", str(tmp_path)]
    assert main(arguments) == 2
    result = read_output(capsys.readouterr().out)
    assert result is not None and result.kind == "bad_input" and "torch sees no GPU here" in result.message


def test_the_result_is_ascii_and_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    field = "train.st\u00e9ps\u2028x=1"
    main(["--nodes=1", "--processes=1", "--device=cpu", "--", "--preset", "debug", "--run-dir", str(tmp_path), field])
    printed = capsys.readouterr().out
    result = read_output(printed)
    assert printed.isascii() and result is not None and result.kind == "bad_input" and "st\u00e9ps" in result.message


def test_a_run_that_is_resumed_alone_is_checked_with_its_own_configuration(tmp_path: Path, capsys: Capture) -> None:
    """As train.py resolves it: neither a preset nor a file is named."""
    overrides = ["train.micro_batch_size=3", "parallel.world_size=2"]
    (tmp_path / "config.yaml").write_text(load_config("debug", overrides=overrides).to_yaml())
    alone = ["--", "--resume", "auto", "--run-dir", str(tmp_path)]
    assert main(["--nodes=1", "--gpus-per-node=1", *alone]) == 2
    said = capsys.readouterr().err
    for part in ("parallel.world_size = 2", "train.micro_batch_size", "data.path"):
        assert part in said, said
    assert "--preset" not in said


def test_a_login_node_finds_what_an_export_and_tensorboard_need(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as slurm/environment.sh sets it
    monkeypatch.setattr(tensorboard_log, "find_spec", lambda name: None)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine.txt").write_text("not an export")
    more = ("export.format=gpt2", "export.repository=me/small", "tensorboard.enabled=true")
    code, said = check(capsys, "--run-dir", str(tmp_path), *more)
    assert code == 2 and "export.repository = 'me/small'" in said and "set HF_HUB_OFFLINE=0" in said
    assert "holds something that is not an export" in said and "needs the package tensorboard" in said
    monkeypatch.setenv("MLRA_PYTHON", "apptainer exec image python3")
    _, said = check(capsys, "--run-dir", str(tmp_path), *more)
    assert "needs the package tensorboard" not in said, "the container has its own"
