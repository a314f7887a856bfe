"""TEV of checkpoint folders, through the command line: every layout of files, and every way they can be bad."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mlra_scale.cli.tev import COMMAND
from tests.support.tools import run_tool

VOCABULARY, HIDDEN = 53, 16
Measure = Callable[..., dict[str, Any]]
Refuse = Callable[..., str]


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str]) -> Measure:
    def run(path: Path, *arguments: str) -> dict[str, Any]:
        code = COMMAND.main([str(path), "--json", *arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    def run(path: Path, *arguments: str) -> str:
        assert COMMAND.main([str(path), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("tev: error: ") and captured.err.count("\n") == 1
        return captured.err

    return run


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=HIDDEN, n_layer=2, n_head=2))


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **shape))


def check(content: dict[str, Any], matrix: torch.Tensor) -> None:
    expected = matrix.detach().double().numpy()
    tev = expected.std(axis=1)
    found = [content["mean"], content["std"], content["mean_embedding_norm"], content["mean_row_rms"]]
    rms = np.sqrt((expected**2).mean(axis=1)).mean()
    np.testing.assert_allclose(found, [tev.mean(), tev.std(), np.linalg.norm(expected.mean(axis=0)), rms], rtol=1e-12)
    quantiles = content["quantiles"]
    np.testing.assert_allclose(list(quantiles.values()), np.quantile(tev, [float(q) for q in quantiles]), rtol=1e-12)
    assert (content["num_tokens"], content["hidden_size"]) == expected.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["1GB", "6KB"], ids=["one file", "shards"])
def test_gpt2_saved_by_transformers(tmp_path: Path, measure: Measure, dtype: torch.dtype, shard_size: str) -> None:
    model = gpt2().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "6KB")
    result = measure(tmp_path)
    (embedding,) = result["embeddings"]
    check(embedding, model.transformer.wte.weight)
    assert embedding["name"].endswith("wte.weight") and embedding["dtype"] == str(dtype).removeprefix("torch.")
    assert result["head_is_tied"] is True and result["ddof"] == 0


def test_an_untied_head_is_reported_too_and_a_tied_one_that_is_stored_twice_is_recognised(
    tmp_path: Path, measure: Measure
) -> None:
    model = llama(tied=False)
    model.save_pretrained(tmp_path)
    result = measure(tmp_path)
    assert [(e["role"], e["name"]) for e in result["embeddings"]] == [
        ("input", "model.embed_tokens.weight"),
        ("head", "lm_head.weight"),
    ]
    check(result["embeddings"][0], model.model.embed_tokens.weight)
    check(result["embeddings"][1], model.lm_head.weight)
    assert result["head_is_tied"] is False
    matrix = torch.randn(VOCABULARY, HIDDEN)
    save_file({"model.embed_tokens.weight": matrix, "lm_head.weight": matrix.clone()}, tmp_path / "model.safetensors")
    result = measure(tmp_path)
    assert len(result["embeddings"]) == 1 and result["head_is_tied"] is True


def test_report_for_people(tmp_path: Path) -> None:
    llama(tied=False).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({f"word{i}": i for i in range(VOCABULARY)}))
    done = run_tool("tev", tmp_path, "--extremes", 3)
    assert done.code == 0, done.stderr
    assert "input embedding model.embed_tokens.weight: 53 tokens x 16, float32" in done.stdout
    assert "untied head lm_head.weight" in done.stdout
    assert done.stdout.count("TEV mean") == 2 and done.stdout.count('"word') == 12


def test_only_the_file_with_the_embedding_is_read(tmp_path: Path, measure: Measure) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = index["transformer.wte.weight"]
    for file in set(index.values()) - {needed}:
        (tmp_path / file).unlink()
    check(measure(tmp_path)["embeddings"][0], model.transformer.wte.weight)


def test_padded_rows_are_left_out(tmp_path: Path, measure: Measure) -> None:
    matrix = torch.randn(64, HIDDEN)
    save_file({"transformer.wte.weight": matrix}, tmp_path / "model.safetensors")
    check(measure(tmp_path)["embeddings"][0], matrix)
    check(measure(tmp_path, "--tokens", "60")["embeddings"][0], matrix[:60])
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    check(measure(tmp_path)["embeddings"][0], matrix[:50])
    assert measure(tmp_path)["embeddings"][0]["rows"] == 64


def test_tensor_by_name_and_single_file(tmp_path: Path, measure: Measure) -> None:
    matrix = torch.randn(7, 5)
    save_file({"encoder.table": matrix, "other": torch.zeros(3)}, tmp_path / "weights.safetensors")
    check(measure(tmp_path, "--tensor", "encoder.table")["embeddings"][0], matrix)
    check(measure(tmp_path / "weights.safetensors", "--tensor", "encoder.table")["embeddings"][0], matrix)


def test_extremes_with_and_without_texts(tmp_path: Path, measure: Measure) -> None:
    matrix = torch.randn(4, HIDDEN)
    matrix[2] *= 100
    matrix[1] = 3
    save_file({"transformer.wte.weight": matrix}, tmp_path / "model.safetensors")
    (embedding,) = measure(tmp_path, "--extremes", "2")["embeddings"]
    assert embedding["highest"][0]["token"] == 2 and embedding["highest"][0]["text"] is None
    assert embedding["lowest"][0] == {"token": 1, "text": None, "tev": 0.0}
    words = {"zero": 0, "one": 1, "two": 2, "three": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    assert measure(tmp_path, "--extremes", "1")["embeddings"][0]["highest"][0]["text"] == "two"
    Tokenizer(WordLevel({"z": 0, "o": 1, "t": 2}, unk_token="z")).save(str(tmp_path / "tokenizer.json"))
    (embedding,) = measure(tmp_path, "--extremes", "4")["embeddings"]
    assert {t["token"]: t["text"] for t in embedding["highest"]} == {0: "z", 1: "o", 2: "t", 3: None}


def write_index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_bad_paths_and_files(tmp_path: Path, refuse: Refuse) -> None:
    assert "is not there" in refuse(tmp_path / "nowhere")
    assert "no .safetensors file" in refuse(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickle" in refuse(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not at all")
    assert "cannot be read as safetensors" in refuse(tmp_path)
    save_file({"transformer.wte.weight": torch.ones(300, 300)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    assert "cannot be read as safetensors" in refuse(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refuse(tmp_path)


def test_bad_indices(tmp_path: Path, refuse: Refuse) -> None:
    write_index(tmp_path, "{")
    assert "is not valid JSON" in refuse(tmp_path)
    write_index(tmp_path, {"weights": {}})
    assert "no weight_map" in refuse(tmp_path)
    write_index(tmp_path, {"weight_map": {"wte.weight": "model-1.safetensors"}})
    assert "model-1.safetensors" in refuse(tmp_path)
    save_file({"wpe.weight": torch.ones(3, 3)}, tmp_path / "model-1.safetensors")
    assert "although the index says so" in refuse(tmp_path)


def test_tensors_that_are_no_embedding(tmp_path: Path, refuse: Refuse) -> None:
    tensors = {
        "a.weight": torch.ones(2, 2),
        "numbers": torch.ones(2, 2, dtype=torch.int64),
        "vector": torch.ones(2),
        "infinite": torch.full((2, 2), torch.inf),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert "--tensor: a.weight, infinite, numbers, vector" in refuse(tmp_path)
    assert "no tensor 'b'" in refuse(tmp_path, "--tensor", "b")
    assert "int64 [2, 2]" in refuse(tmp_path, "--tensor", "numbers")
    assert "float32 [2]" in refuse(tmp_path, "--tensor", "vector")
    assert "not finite" in refuse(tmp_path, "--tensor", "infinite")
    assert "2 rows, not 3" in refuse(tmp_path, "--tensor", "a.weight", "--tokens", "3")
    save_file({"encoder.wte.weight": torch.ones(2, 2), "wte.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert "several embeddings" in refuse(tmp_path)


def test_a_bad_tokenizer(tmp_path: Path, refuse: Refuse) -> None:
    save_file({"wte.weight": torch.randn(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in refuse(tmp_path, "--extremes", "1")


@pytest.mark.parametrize("flag", ["--tokens", "--extremes"])
def test_bad_counts_name_flag_and_range(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    for value in ("4k", "inf", "0", "-1", "1.5", ""):
        with pytest.raises(SystemExit) as ended:
            COMMAND.main(["folder", f"{flag}={value}"], "tev.py")
        assert ended.value.code == 2
        expected = f"tev.py: error: argument {flag}: {value!r} is not a whole number from 1 on\n"
        assert capsys.readouterr().err.endswith(expected)
