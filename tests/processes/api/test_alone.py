"""The public face where only torch and numpy, or transformers too, are installed: each in a process of its own."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.gpt2_folders import random_gpt2
from tests.unit.test_imports import ROOT

HIDE = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_others(name, *rest):
    return None if name.partition(".")[0] in {names!r} else find(name, *rest)

PathFinder.find_spec = staticmethod(find_others)
"""
"""Code after which some packages are not installed, as far as imports see."""

ALONE = """
import numpy, torch
import mlra_scale

model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(50, 8), "q": mlra_scale.LowRankLinear(8, 8, 4)})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
hidden = model["q"](model["embedding"](torch.arange(50)))
(hidden @ model["embedding"].weight.T).logsumexp(-1).sum().backward()
optimizer.step()
summary = mlra_scale.tev(model)
expected = model["embedding"].weight.detach().double().numpy().std(axis=1)
numpy.testing.assert_allclose([summary.mean, summary.std], [expected.mean(), expected.std()], rtol=1e-12)
assert summary.num_tokens == 50
try:
    mlra_scale.TevCallback
except ImportError as error:
    print(error)
"""


def run(code: str, folder: Path) -> str:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    command = [sys.executable, "-I", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def other_dependencies() -> set[str]:
    """What a plain installation brings beside torch, numpy and what torch itself needs."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^A-Za-z0-9_]", entry)[0] for entry in listed} - {"torch", "numpy", "jinja2", "tqdm"}
    assert {"transformers", "deepspeed", "megatron", "pydantic", "ruamel", "datasets", "wandb"} <= names
    return names


def test_torch_and_numpy_are_enough(tmp_path: Path) -> None:
    output = run(HIDE.format(names=other_dependencies()) + ALONE, tmp_path)
    assert output == "mlra_scale.TevCallback needs transformers: pip install transformers\n"


@pytest.mark.slow
def test_transformers_alone_is_enough_for_its_part(tmp_path: Path) -> None:
    """Also that the auto classes read and make the model without remote code."""
    random_gpt2().save_pretrained(tmp_path / "gpt2")
    # peft, which lm-evaluation-harness brings along, needs accelerate.
    names = {"accelerate", "datasets", "deepspeed", "lightning", "megatron", "peft", "pydantic", "wandb"}
    code = """
import sys
import mlra_scale
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

gpt2 = GPT2LMHeadModel.from_pretrained("gpt2")
mlra_scale.replace_attention_projections(gpt2, 4)
assert mlra_scale.tev(gpt2).num_tokens == len(gpt2.transformer.wte.weight)
assert mlra_scale.TevCallback.__name__ == "TevCallback"
model = AutoModelForCausalLM.from_config(mlra_scale.MlraConfig(
    vocab_size=40, max_position_embeddings=16, num_hidden_layers=2, hidden_size=16, num_attention_heads=2,
    attention_rank=4, attention_init="matched",
))
assert type(model) is mlra_scale.MlraForCausalLM
model.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved")
assert type(again) is mlra_scale.MlraForCausalLM
assert type(AutoModel.from_pretrained("saved")) is mlra_scale.MlraModel
assert mlra_scale.tev(again) == mlra_scale.tev(model)
assert not any(name.startswith("transformers_modules") for name in sys.modules)
"""
    run(HIDE.format(names=names) + code, tmp_path)
    saved = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"modeling_mlra.py", "low_rank_linear.py", "config.json", "model.safetensors"} <= saved
