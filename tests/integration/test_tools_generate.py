"""tools/generate.py on checkpoints, runs and exported folders."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlra_scale.checkpoint.huggingface.importing import import_gpt2
from tests.support.gpt2_folders import gpt2_folder
from tests.support.tools import ROOT, run_tool
from tests.support.training_runs import environment

PROMPTS = ["A window slides", "Low", "three ways to count"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 folder, a run with it as its checkpoint, and an export of that with factors."""
    place = tmp_path_factory.mktemp("place")
    folder = gpt2_folder(place / "gpt2", n_positions=64)
    import_gpt2(folder, place / "run" / "checkpoints" / "step-00000001", rank=32)
    exported = run_tool("export_hf", place / "run", place / "mlra", "--format", "mlra", "--no-verify")
    assert exported.code == 0, exported.stderr
    return place


def written(*arguments: object) -> list[dict[str, Any]]:
    result = run_tool("generate", *arguments, "--json")
    assert result.code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kind_of_model_writes_what_stock_transformers_writes(place: Path) -> None:
    model, read = AutoModelForCausalLM.from_pretrained(place / "gpt2"), AutoTokenizer.from_pretrained(place / "gpt2")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    expected = []
    for prompt in PROMPTS:
        encoded = read(prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**encoded, do_sample=False, max_new_tokens=12, pad_token_id=0)[0]
        expected.append(read.decode(tokens[encoded.input_ids.shape[1] :], skip_special_tokens=True))
    for path in (place / "gpt2", place / "run", place / "mlra"):
        found = written(path, "--prompts", place / "prompts.txt", "--greedy", "--max-new-tokens", 12)
        assert [item["text"] for item in found] == expected
        assert [item["prompt"] for item in found] == PROMPTS


def test_samples_and_seeds(place: Path) -> None:
    options = (place / "run", "--prompt", "Low", "--prompt", "", "--num-samples", 3, "--max-new-tokens", 8)
    first = written(*options, "--seed", 5)
    assert [item["prompt"] for item in first] == ["Low"] * 3 + [""] * 3
    assert len({item["text"] for item in first}) > 3
    assert written(*options, "--seed", 5) == first
    assert written(*options, "--seed", 6) != first


def test_the_report_for_people(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Low\n"))
    result = run_tool("generate", place / "run", "--num-samples", 2, "--max-new-tokens", 5)
    assert result.code == 0 and result.stderr == ""
    assert result.stdout.startswith("Low") and "\n" + "-" * 20 + "\nLow" in result.stdout


def test_the_command_line_alone(place: Path) -> None:
    command = [sys.executable, "tools/generate.py", str(place / "mlra"), "--greedy", "--max-new-tokens", "4"]
    result = subprocess.run(
        command, cwd=ROOT, input="Low\n", env=environment(), capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Low") and result.stderr == ""


def test_the_quickstart_sample_is_plain_transformers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Makefile's snippet runs as it stands, and uses nothing of this project."""
    found = re.search(r"^define SAMPLE\n(.*?)^endef", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None and "mlra" not in found[1]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "argv", ["-c", str(place / "gpt2")])
        exec(compile(found[1], "SAMPLE", "exec"), {})
    assert capsys.readouterr().out.startswith("Return a list of")


def test_wrong_input_is_one_message(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\n")
    prompt = ("--prompt", "Low")
    for arguments, message in (
        ((tmp_path / "nothing", *prompt), "does not exist"),
        ((place / "run", "--prompts", tmp_path / "no.txt"), "cannot be read"),
        ((place / "run", "--prompts", tmp_path / "empty.txt"), "holds no prompt"),
        ((place / "run", "--prompts", tmp_path / "bytes.txt"), "is not UTF-8 text"),
        ((place / "run", "--prompt", "caf\udce9"), r"prompt 'caf\udce9' is not UTF-8 text"),
        ((place / "run", *prompt, "--max-new-tokens", 64), "longer than the 64 positions"),
        ((place / "run", *prompt, "--temperature", 0), "temperature cannot be 0"),
        ((place / "run", *prompt, "--seed", -1), "--seed: '-1' is not a whole number"),
    ):
        result = run_tool("generate", *arguments)
        assert result.code == 2 and message in result.stderr, (message, result)
        assert result.stdout == ""
