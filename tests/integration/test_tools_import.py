"""tools/import_hf.py, and the way back through tools/export_hf.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.state_contents import write_small_files
from mlra_scale.config import Config
from mlra_scale.evaluation.verification_text import validation_tokens
from tests.support.gpt2_folders import TEXT, gpt2_folder
from tests.support.tools import Ran, run_tool
from tests.support.training_runs import Start, curve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_folder(tmp_path_factory.mktemp("model") / "gpt2", embd_pdrop=0.0, n_inner=80)


def ran(*arguments: object) -> Ran:
    result = run_tool("import_hf", *arguments)
    assert result.code == 0, result.stderr
    return result


def test_dense_goes_there_and_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    ran(folder, tmp_path / "made")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    exported = run_tool("export_hf", tmp_path / "made", tmp_path / "back", "--text", tmp_path / "text.txt")
    assert exported.code == 0, exported.stderr
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    before, after = (GPT2LMHeadModel.from_pretrained(path).config.to_dict() for path in (folder, tmp_path / "back"))
    for key in ("n_inner", "n_embd", "n_layer", "n_head", "n_positions", "vocab_size", "layer_norm_epsilon"):
        assert after[key] == before[key], key
    for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range", "eos_token_id"):
        assert after[key] == before[key], key
    tokens = [AutoTokenizer.from_pretrained(path)(TEXT).input_ids for path in (folder, tmp_path / "back")]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("has_settings", [True, False], ids=["as the hub has it", "vocab.json and merges.txt alone"])
def test_what_ends_a_text_comes_along(folder: Path, tmp_path: Path, has_settings: bool) -> None:
    """GPT-2's own folder leaves its eos token to the class that its config.json names."""
    shutil.copytree(folder, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    if not has_settings:
        (tmp_path / "gpt2" / "tokenizer_config.json").unlink()
        (tmp_path / "gpt2" / "tokenizer.json").unlink()
    ran(tmp_path / "gpt2", tmp_path / "made")
    exported = run_tool("export_hf", tmp_path / "made", tmp_path / "back", "--no-verify")
    assert exported.code == 0, exported.stderr
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    model, back = GPT2LMHeadModel.from_pretrained(tmp_path / "back"), AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (model.generation_config.eos_token_id, model.config.eos_token_id, back.eos_token_id) == (end, end, end)
    assert back(TEXT).input_ids == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids


def test_a_whole_models_folder_as_tokenizer_leaves_its_weights_there(folder: Path, tmp_path: Path) -> None:
    files = write_small_files(tmp_path, "0", b"{}", [], "", folder)
    copied = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"}
    assert copied <= files.keys() and not [name for name in files if name.endswith("model.safetensors")]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_full_rank_factors_merge_to_the_same_logits(folder: Path, tmp_path: Path) -> None:
    ran(folder, tmp_path / "made", "--rank", 32, "--factorise", "o,q,k,v")
    exported = run_tool("export_hf", tmp_path / "made", tmp_path / "back", "--no-verify")
    assert exported.code == 0, exported.stderr
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        before, after = (GPT2LMHeadModel.from_pretrained(path)(tokens).logits for path in (folder, tmp_path / "back"))
    assert (before - after).abs().max() < 1e-4


def test_the_energy_kept_is_reported(folder: Path, tmp_path: Path) -> None:
    result = ran(folder, tmp_path / "a", "--rank", 8, "--json")
    content = json.loads(result.stdout)
    kept = content["energy_kept"]
    assert [(entry["block"], entry["projection"]) for entry in kept] == [(b, p) for b in (0, 1) for p in "qkv"]
    assert all(0.3 < entry["energy"] < 0.8 for entry in kept)
    assert content["parameters"] == Store.open(tmp_path / "a").model.num_parameters()
    assert content["stored_dtypes"] == ["float32"] and content["has_tokenizer"]
    result = ran(folder, tmp_path / "b", "--rank", 8)
    table = [line.split() for line in result.stdout.splitlines()]
    assert ["layer", "q", "k", "v"] in table
    row = next(words for words in table if words[0] == "1" and len(words) == 4)
    assert [float(word) for word in row[1:]] == [round(entry["energy"], 5) for entry in kept[3:]]
    means = next(words for words in table if words[0] == "mean")
    assert float(means[1]) == pytest.approx((kept[0]["energy"] + kept[3]["energy"]) / 2, abs=1e-5)
    assert f"--config {tmp_path / 'b'}/config.yaml --resume {tmp_path / 'b'} " in result.stdout


def test_training_goes_on_from_it(start: Start, tmp_path: Path) -> None:
    """A dense GPT-2 becomes MLRA: at full rank the first validation loss is that of the GPT-2 itself."""
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False, vocab_size=512, n_positions=64)
    ran(folder, tmp_path / "made", "--rank", 32)
    source = ["--config", tmp_path / "made" / "config.yaml", "--resume", tmp_path / "made"]
    result = start("run", *map(str, source), "train.steps=2", "parallel.pipeline=2", num_processes=2)
    assert "begins with the weights of" in result.stdout
    losses = curve(tmp_path / "run", "validation_loss")
    config = Config.from_yaml((tmp_path / "run" / "config.yaml").read_text())
    count = config.evaluation.batches * config.train.global_batch_size
    tokens = validation_tokens(config, count * config.train.sequence_length)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[2] < losses[0]
    made = run_tool("export_hf", tmp_path / "run", tmp_path / "out", "--tokens", 128)
    assert made.code == 0, made.stderr


def test_padding_is_a_choice(folder: Path, tmp_path: Path) -> None:
    ran(folder, tmp_path / "made", "--vocab-padding-multiple", 7)
    assert Store.open(tmp_path / "made").tensor("embedding.weight").shape[0] == 301


def test_wrong_input_is_one_message_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "nothing", tmp_path / "made"), "config.json does not exist"),
        ((folder, folder), "exists"),
        ((folder, tmp_path / "made", "--rank", "40"), "use 1 to 32"),
        ((folder, tmp_path / "made", "--rank", "0"), "--rank: '0' is not a whole number from 1 on"),
        ((folder, tmp_path / "made", "--factorise", "q"), "--factorise needs --rank"),
        ((folder, tmp_path / "made", "--rank", "4", "--factorise", "q,x"), "--factorise: 'q,x' is not a list of q"),
    ):
        result = run_tool("import_hf", *arguments)
        assert result.code == 2 and message in result.stderr, result
        assert list(tmp_path.iterdir()) == []
