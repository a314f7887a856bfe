"""Exports with code of their own, in a process without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, export_checkpoint
from mlra_scale.shipped import low_rank_linear, modeling_mlra
from mlra_scale.shipped.modeling_mlra import MlraConfig, MlraForCausalLM
from tests.parity.test_reference import make_reference
from tests.support.gpt2_folders import tokenizer
from tests.unit.checkpoint.huggingface.builders import checkpoint
from tests.unit.checkpoint.huggingface.test_modeling import make_model, random_tokens


def test_saved_models_load_as_remote_code_in_a_process_without_this_package(tmp_path: Path) -> None:
    reference = make_reference(("q", "k", "v", "o"))
    model = make_model(reference, ("q", "k", "v", "o")).float()
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    assert MlraConfig.from_pretrained(folder).to_dict() == {**model.config.to_dict(), **_saved_only(folder)}
    again = MlraForCausalLM.from_pretrained(folder)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    prompt = random_tokens(1, 5, seed=9)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    code = (
        "import json, sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "folder, prompt = sys.argv[1], json.loads(sys.argv[2])\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "tokens = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)\n"
        "model.save_pretrained(folder + '-again')\n"
        "assert not any(name.startswith('mlra_scale') for name in sys.modules)\n"
        "print(json.dumps([type(model).__name__, type(model).__module__, tokens[0].tolist()]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(prompt[0].tolist())],
        capture_output=True, text=True, timeout=200, cwd=tmp_path, env=_environment(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    name, module, generated = json.loads(result.stdout.splitlines()[-1])
    assert name == "MlraForCausalLM" and module.startswith("transformers_modules.")
    assert generated == expected
    # What the remote code saves is whole again.
    for module in (modeling_mlra, low_rank_linear):
        source = Path(str(module.__file__))
        assert (tmp_path / "saved-again" / source.name).read_text() == source.read_text()
    assert json.loads((tmp_path / "saved-again" / "config.json").read_text())["auto_map"]


def _saved_only(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {name: config[name] for name in ("auto_map", "architectures", "dtype") if name in config}


def _environment(tmp_path: Path) -> dict[str, str]:
    """No package of ours on the path, and a cache of its own for remote code."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}


def test_the_tokenizer_asks_for_no_code_on_a_terminal(tmp_path: Path) -> None:
    """As the model card has it; without the argument transformers 5 asks, since config.json names code."""
    export_checkpoint(checkpoint(tmp_path / "checkpoint"), tmp_path / "out", ExportOptions("mlra"), None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained(name, trust_remote_code=False)" in card
    code = (
        "import sys\n"
        "from transformers import AutoTokenizer\n"
        "assert sys.stdin.isatty()\n"
        "print('ids', AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)('Words').input_ids)\n"
    )
    terminal, stdin = os.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")],
            capture_output=True, text=True, timeout=200, stdin=stdin, cwd=tmp_path, env=_environment(tmp_path),
        )  # fmt: skip
    finally:
        os.close(stdin)
        os.close(terminal)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"ids {tokenizer().tokenizer.encode('Words').ids}\n"
    assert not (tmp_path / "modules").exists(), "no code was copied, so none was run"
