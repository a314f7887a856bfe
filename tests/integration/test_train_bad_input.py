"""Bad input: one clear message that names the field and the way out, exit code 2, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
def data(tmp_path: Path, training_data: Path) -> Path:
    """A copy of the data set that a test may damage."""
    return Path(shutil.copytree(training_data, tmp_path / "data"))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command line, in this process up to where ranks would meet, and returns its message."""

    def run(*arguments: str, world_size: int = 1) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        code = entry.main(["--run-dir", str(tmp_path / "run"), *arguments])
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


CONFIGURATIONS = {
    "unknown preset": (["--preset", "gpt2-mlra-72"], 1, ["preset", "gpt2-mlra-72l"]),
    "unknown section": (["--preset", "debug", "trian.steps=5"], 1, ["trian", "'train'"]),
    "unknown key": (["--preset", "debug", "model.num_layer=5"], 1, ["num_layer", "num_layers"]),
    "wrong type": (["--preset", "debug", "train.steps=many"], 1, ["train.steps", "an integer"]),
    "no value": (["--preset", "debug", "train.steps"], 1, ["train.steps", "section.field=value"]),
    "heads and tensor": (["--preset", "debug", "parallel.tensor=3"], 3, ["parallel.tensor", "model.num_heads 4"]),
    "layers and stages": (["--preset", "debug", "parallel.pipeline=5"], 5, ["parallel.pipeline", "4 layers"]),
    "batch": (["--preset", "debug", "train.global_batch_size=7"], 1, ["train.global_batch_size", "6 or 8"]),
    "rank": (["--preset", "debug", "model.attention_rank=65"], 1, ["model.attention_rank", "at most 64"]),
    "world size": (["--preset", "debug", "parallel.tensor=2"], 3, ["3 ranks", "multiple of 2"]),
    "expected world size": (["--preset", "debug", "parallel.world_size=8"], 2, ["parallel.world_size", "start 8"]),
    "positions": (
        ["--preset", "debug", "train.sequence_length=65"],
        1,
        ["train.sequence_length", "model.max_positions"],
    ),
    "gpu": (["--preset", "debug", "train.device=cuda"], 1, ["train.device", "no GPU"]),
    "fp16 on a cpu": (["--preset", "debug", "train.precision=fp16"], 1, ["train.precision", "runs on cuda only"]),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configuration(case: str, refused: Refused, training_data: Path) -> None:
    arguments, world_size, parts = CONFIGURATIONS[case]
    has(refused(*arguments, f"data.path={training_data}", world_size=world_size), *parts)


YAML = {
    "wrong types": ("train:\n  steps: '5'\n", ["train.steps", "an integer, not text"]),
    "duplicate keys": ("train:\n  steps: 5\n  steps: 6\n", ["'steps' is given twice"]),
    "not yaml": ("train: [1\n", ["--config", "line"]),
    "unknown key": ("optim:\n  learning_rate: 1.0e-3\n", ["learning_rate"]),
}


@pytest.mark.parametrize("case", YAML)
def test_config_file(case: str, refused: Refused, tmp_path: Path, training_data: Path) -> None:
    text, parts = YAML[case]
    (tmp_path / "c.yaml").write_text(text)
    has(refused("--preset", "debug", "--config", "c.yaml", f"data.path={training_data}"), *parts)


DEEPSPEED = {
    "batch key": ({"train_batch_size": 8}, 1, ["train_batch_size", "train.global_batch_size"]),
    "optimizer": ({"optimizer": {"type": "Adam"}}, 1, ["deepspeed.optimizer", "optim.lr"]),
    "stage 3 and stages": ({"zero_optimization": {"stage": 3}}, 2, ["zero_optimization.stage", "pipeline"]),
    "invalid json": ('{"zero_optimization": {"stage": 1,}}', 1, ["--ds-config", "not valid JSON"]),
}


@pytest.mark.parametrize("case", DEEPSPEED)
def test_deepspeed_file(case: str, refused: Refused, tmp_path: Path, training_data: Path) -> None:
    content, stages, parts = DEEPSPEED[case]
    (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    arguments = ["--preset", "debug", "--ds-config", "ds.json", f"parallel.pipeline={stages}"]
    has(refused(*arguments, f"data.path={training_data}", world_size=stages), *parts)


def test_missing_files(refused: Refused) -> None:
    message = refused("--preset", "debug", "--config", "no.yaml", "--ds-config", "no.json")
    has(message, "--config", "cannot be read: No such file")
    has(message, "--ds-config", "cannot be read: No such file")


def test_no_data(refused: Refused) -> None:
    has(refused("--preset", "debug"), "data.path", "tools/prepare_data.py")


def test_missing_data(refused: Refused, tmp_path: Path) -> None:
    has(refused("--preset", "debug", f"data.path={tmp_path / 'nowhere'}"), "data.path", "nowhere")


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "manifest.json"])
def test_truncated_data(name: str, refused: Refused, data: Path) -> None:
    content = (data / name).read_bytes()
    (data / name).write_bytes(content[: len(content) // 2])
    has(refused("--preset", "debug", f"data.path={data}"), "data.path", name)


def test_a_file_of_the_data_is_gone(refused: Refused, data: Path) -> None:
    (data / "train.bin").unlink()
    has(refused("--preset", "debug", f"data.path={data}"), "data.path", "train")


def test_foreign_data(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(b"\0" * 64)
    (tmp_path / "other.idx").write_bytes(b"not an index of Megatron" * 4)
    has(refused("--preset", "debug", f"data.path={tmp_path / 'other'}"), "data.path", "other.idx")


def test_vocabulary_larger_than_the_models(refused: Refused, training_data: Path) -> None:
    message = refused("--preset", "debug", f"data.path={training_data}", "model.vocab_size=500")
    has(message, "model.vocab_size", "512")


def test_another_tokenizer_than_the_manifests(refused: Refused, data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "tokenizer" / "tokenizer.json").read_text())
    last = content["model"]["merges"].pop()
    del content["model"]["vocab"]["".join(last)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    message = refused("--preset", "debug", f"data.path={data}", f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    has(message, "data.tokenizer", "another tokenizer")


def test_empty_split(refused: Refused, tmp_path: Path) -> None:
    """Of a single document, the last share for validation leaves nothing to train on."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "one.bin"), dtype=np.uint16)
    builder.add_document(np.arange(200) % 256, [200])
    builder.finalize(str(tmp_path / "one.idx"))
    has(refused("--preset", "debug", f"data.path={tmp_path / 'one'}"), "data.path", "train split has no documents")


def test_validation_shorter_than_a_sample(refused: Refused, training_data: Path) -> None:
    arguments = ["train.sequence_length=20000", "model.max_positions=20000"]
    message = refused("--preset", "debug", f"data.path={training_data}", *arguments)
    has(message, "its validation split", "20001")


def test_run_directory_of_another_run(refused: Refused, tmp_path: Path, training_data: Path) -> None:
    RunDirectory(tmp_path / "run").create(preset("debug"))
    has(refused("--preset", "debug", f"data.path={training_data}"), "--run-dir", "--resume auto")


def test_a_run_directory_in_use(refused: Refused, tmp_path: Path, training_data: Path) -> None:
    with run_lock(RunDirectory(tmp_path / "run")):
        has(refused("--preset", "debug", f"data.path={training_data}"), "--run-dir", "another run is at work here")


def test_a_launcher_that_is_not_torchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, training_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    arguments = ["--preset", "debug", "--run-dir", str(tmp_path / "run"), f"data.path={training_data}"]
    assert entry.main(arguments) == ExitCode.BAD_INPUT
    has(capsys.readouterr().err, "SLURM_NTASKS", "torchrun")
    assert list(tmp_path.iterdir()) == []


def test_resume_from_nothing(refused: Refused, tmp_path: Path, training_data: Path) -> None:
    message = refused("--preset", "debug", "--resume", str(tmp_path / "gone"), f"data.path={training_data}")
    has(message, "--resume", "gone")


def test_wrong_flag(refused: Refused) -> None:
    has(refused("--preset", "debug", "--learning-rate", "1"), "command line", "--learning-rate")


def test_everything_at_once(refused: Refused) -> None:
    """Whatever is wrong is told in one go, configuration, device and data alike."""
    message = refused("--preset", "debug", "data.path=nowhere", "model.attention_rank=65", "train.device=cuda")
    for parts in (["data.path"], ["model.attention_rank"], ["train.device"]):
        has(message, *parts)


def test_no_run_directory(training_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--preset", "debug", f"data.path={training_data}"]) == ExitCode.BAD_INPUT
    has(capsys.readouterr().err, "--run-dir", "is required")


def test_in_a_process_of_its_own(tmp_path: Path, training_data: Path) -> None:
    result = train("--preset", "debug", "--run-dir", str(tmp_path / "run"), f"data.path={training_data}", "optim.lr=-1")
    assert result.code == ExitCode.BAD_INPUT
    assert result.stdout == ""
    assert result.stderr == "mlra_scale.train: bad input\n  optim.lr = -1: must be > 0.0\n"
    assert list(tmp_path.iterdir()) == []


def test_under_a_launcher_it_is_reported_once(tmp_path: Path, training_data: Path) -> None:
    arguments = ["--preset", "debug", "--run-dir", str(tmp_path / "run"), "parallel.tensor=3"]
    result = train(*arguments, f"data.path={training_data}", num_processes=2)
    assert result.code == 1, "torchrun's own, whatever the workers' is"
    assert result.stderr.count("bad input") == 1 and result.stderr.count("model.num_heads 4") == 1
    assert "exitcode  : 2" in result.stderr
    assert list(tmp_path.iterdir()) == []
