"""Bad input: one clear message that names the field and the way out, exit code 2, nothing left behind.

What each rule refuses is tested in tests/unit/config and tests/unit/data; here, that every source of input leads there.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlra_scale import train as entry
from mlra_scale.config import preset
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.run_directory import RunDirectory, run_lock
from tests.support.processes import train

Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(
    tmp_path: Path, training_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs the command line, in this process up to where ranks would meet, and returns its message."""

    def run(*arguments: str, world_size: int = 1) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        source = [] if any(part.startswith("data.") for part in arguments) else [f"data.path={training_data}"]
        code = entry.main(["--run-dir", str(tmp_path / "run"), *arguments, *source])
        message = capsys.readouterr().err
        assert code == ExitCode.BAD_INPUT, message
        assert tree(tmp_path) == before, "something was left behind"
        assert message.count("bad input") == 1 and "Traceback" not in message
        return message

    return run


def has(message: str, *parts: str) -> None:
    """Fails unless the message has one problem line that holds all parts."""
    lines = [line for line in message.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, message


DEBUG = ("--preset", "debug")
CASES: dict[str, tuple[list[str], int, list[str]]] = {
    "preset": (["--preset", "gpt2-mlra-72"], 1, ["preset", "gpt2-mlra-72l"]),
    "override": ([*DEBUG, "model.num_layer=5"], 1, ["num_layer", "num_layers"]),
    "a rule": ([*DEBUG, "train.global_batch_size=7"], 1, ["train.global_batch_size", "6 or 8"]),
    "world size": ([*DEBUG, "parallel.tensor=2"], 3, ["3 ranks", "multiple of 2"]),
    "gpu": ([*DEBUG, "train.device=cuda"], 1, ["train.device", "no GPU"]),
    "config file": ([*DEBUG, "--config", "c.yaml"], 1, ["'steps' is given twice"]),
    "deepspeed file": ([*DEBUG, "--ds-config", "ds.json"], 1, ["--ds-config", "not valid JSON"]),
    "file that is not there": ([*DEBUG, "--ds-config", "none.json"], 1, ["--ds-config", "cannot be read: No such"]),
    "no data": ([*DEBUG, "data.path=null"], 1, ["data.path", "mlra-scale prepare"]),
    "missing data": ([*DEBUG, "data.path=nowhere"], 1, ["data.path", "nowhere"]),
    "vocabulary": ([*DEBUG, "model.vocab_size=500"], 1, ["model.vocab_size", "512"]),
    "resume from nothing": ([*DEBUG, "--resume", "gone"], 1, ["--resume", "gone"]),
    "flag": ([*DEBUG, "--learning-rate", "1"], 1, ["command line", "--learning-rate"]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_source_of_input(case: str, refused: Refused, tmp_path: Path) -> None:
    arguments, world_size, parts = CASES[case]
    (tmp_path / "c.yaml").write_text("train:\n  steps: 5\n  steps: 6\n")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1,}}')
    has(refused(*arguments, world_size=world_size), *parts)


@pytest.mark.parametrize("name", ["train.bin", "manifest.json"])
def test_truncated_data(name: str, refused: Refused, tmp_path: Path, training_data: Path) -> None:
    data = Path(shutil.copytree(training_data, tmp_path / "data"))
    content = (data / name).read_bytes()
    (data / name).write_bytes(content[: len(content) // 2])
    has(refused(*DEBUG, f"data.path={data}"), "data.path", name)


def test_a_run_directory_of_another_run_or_in_use(refused: Refused, tmp_path: Path) -> None:
    with run_lock(RunDirectory(tmp_path / "run")):
        has(refused(*DEBUG), "--run-dir", "another run is at work here")
    RunDirectory(tmp_path / "run").create(preset("debug"))
    has(refused(*DEBUG), "--run-dir", "--resume auto")


def test_a_launcher_that_is_not_torchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, training_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    arguments = [*DEBUG, "--run-dir", str(tmp_path / "run"), f"data.path={training_data}"]
    assert entry.main(arguments) == ExitCode.BAD_INPUT
    has(capsys.readouterr().err, "SLURM_NTASKS", "torchrun")
    assert list(tmp_path.iterdir()) == []


def test_everything_at_once(refused: Refused) -> None:
    """Configuration, device and data alike."""
    message = refused(*DEBUG, "data.path=nowhere", "model.attention_rank=65", "train.device=cuda")
    for field in ("data.path", "model.attention_rank", "train.device"):
        has(message, field)


def test_no_run_directory(training_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([*DEBUG, f"data.path={training_data}"]) == ExitCode.BAD_INPUT
    has(capsys.readouterr().err, "--run-dir", "is required")
    assert entry.main([*DEBUG, "--run-dir", ""]) == 2
    has(capsys.readouterr().err, "--run-dir", "is empty; name a directory")


def test_in_a_process_of_its_own(tmp_path: Path, training_data: Path) -> None:
    result = train(*DEBUG, "--run-dir", str(tmp_path / "run"), f"data.path={training_data}", "optim.lr=-1")
    assert result.code == ExitCode.BAD_INPUT
    assert result.stdout == ""
    assert result.stderr == "mlra_scale.train: bad input\n  optim.lr = -1: must be > 0.0\n"
    assert list(tmp_path.iterdir()) == []


def test_under_a_launcher_it_is_reported_once(tmp_path: Path, training_data: Path) -> None:
    arguments = [*DEBUG, "--run-dir", str(tmp_path / "run"), "parallel.tensor=3"]
    result = train(*arguments, f"data.path={training_data}", num_processes=2)
    assert result.code == 1, "torchrun's own, whatever the workers' is"
    assert result.stderr.count("bad input") == 1 and result.stderr.count("model.num_heads 4") == 1
    assert "exitcode  : 2" in result.stderr
    assert list(tmp_path.iterdir()) == []
