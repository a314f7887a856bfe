"""Damaged or hostile JSON in a Hugging Face folder: each tool ends with one error that names the file, at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, export_checkpoint
from tests.support.gpt2_folders import TEXT, gpt2_folder, random_gpt2, save_tokenizer_files
from tests.support.tools import Ran, run_tool
from tests.unit.checkpoint.huggingface.builders import checkpoint

DEEP = "[" * 100_000 + "]" * 100_000
TEXTS = {
    "deep": DEEP,
    "deep object": '{"a": ' * 50_000 + "1" + "}" * 50_000,
    "list": "[1, 2]",
    "null": "null",
    "cut": '{"model_type": "gpt2", ',
    "empty": "",
    "control characters": '{"\x1b[31mred": 1',
    "twice": '{"model_type": "gpt2", "model_type": "gpt2"}',
    "NaN": '{"model_type": "gpt2", "layer_norm_epsilon": NaN}',
    "digits": '{"n_layer": ' + "9" * 5000 + "}",
    "surrogate": '{"model_type": "gpt2\\ud800"}',
    "not UTF-8": "\udcff",
}
SHARDED, INDEX = "sharded", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in one file and one in shards, and an export with its factors."""
    place = tmp_path_factory.mktemp("folders")
    gpt2_folder(place / "single")
    random_gpt2().save_pretrained(place / SHARDED, max_shard_size="40KB")
    save_tokenizer_files(place / SHARDED)
    export_checkpoint(checkpoint(place / "checkpoint"), place / "mlra", ExportOptions("mlra"), None)
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Path:
    for name in ("single", SHARDED, "mlra"):
        shutil.copytree(folders / name, tmp_path / name)
    shutil.copy(folders / "text.txt", tmp_path)
    return tmp_path


def evaluate(place: Path, folder: str) -> Ran:
    return run_tool("evaluate", place / folder, "--text", place / "text.txt", "--device", "cpu")


def refused(ran: Ran, file: Path, word: str = "") -> str:
    assert ran.code == 2 and ran.stdout == "", (ran.code, ran.stdout)
    message = ran.stderr.removesuffix("\n")
    assert str(file) in message and word in message and message.isprintable() and len(message) < 800, message
    return message


@pytest.mark.parametrize("kind", TEXTS)
def test_every_tool_names_the_damaged_file(copy: Path, kind: str) -> None:
    content = TEXTS[kind].encode("utf-8", "surrogateescape")
    for folder in ("single", "mlra"):
        (copy / folder / "config.json").write_bytes(content)
        refused(evaluate(copy, folder), copy / folder / "config.json")
    refused(run_tool("import_hf", copy / "single", copy / "made"), copy / "single" / "config.json")
    refused(run_tool("tev", copy / "single"), copy / "single" / "config.json")
    (copy / SHARDED / INDEX).write_bytes(content)
    for ran in (
        evaluate(copy, SHARDED),
        run_tool("tev", copy / SHARDED),
        run_tool("import_hf", copy / SHARDED, copy / "made"),
    ):
        refused(ran, copy / SHARDED / INDEX)
    assert not (copy / "made").exists()


@pytest.mark.parametrize("kind", ["deep", "list", "cut", "control characters"])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_small_files_beside_the_model_are_named(copy: Path, name: str, kind: str) -> None:
    (copy / "single" / name).write_text(TEXTS[kind])
    refused(evaluate(copy, "single"), copy / "single" / name)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"model_max_length": int(1e30)}),  # does not fit 64 bits
        ("config.json", {"time_step_limit": [0.0, float("inf")]}),  # Infinity, of models with Mamba layers
        ("config.json", {"num_layers": None, "vision_config": {"num_hidden_layers": None}}),  # what a model lacks
    ],
)
def test_what_transformers_writes_is_read(copy: Path, file: str, values: dict[str, Any]) -> None:
    path = copy / "single" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert evaluate(copy, "single").code == 0 and run_tool("tev", copy / "single").code == 0


ABSURD: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"n_layer": 300_000_000}, "layer"),
    "as many layers as are allowed": ({"n_layer": 10_000}, ""),
    "a layer too many": ({"n_layer": 3}, ""),
    "a layer too few": ({"n_layer": 1}, ""),
    "vocabulary": ({"vocab_size": 10**15}, ""),
    "positions": ({"n_positions": 10**15}, ""),
    "width": ({"n_embd": 10**15}, ""),
    "negative": ({"n_layer": -1}, ""),
    "no heads": ({"n_head": 0}, ""),
    "text": ({"n_layer": "2"}, ""),
    "float": ({"n_layer": 3e8}, ""),
    "true": ({"n_layer": True}, ""),
    "list": ({"n_embd": [32]}, ""),
    "null": ({"vocab_size": None}, ""),
    "no layers": ({"n_layer": None}, ""),
    "escape": ({"activation_function": "\x1b[31mred"}, ""),
    "kind": ({"model_type": "\x1b[2J"}, ""),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_sizes_and_types_end_at_once(copy: Path, kind: str) -> None:
    change, word = ABSURD[kind]
    path = copy / "single" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(run_tool("import_hf", copy / "single", copy / "made"), copy / "single", word)

    refused(evaluate(copy, "single"), copy / "single", word)
    assert not (copy / "made").exists()


def test_absurd_layers_of_an_export_with_factors(copy: Path) -> None:
    path = copy / "mlra" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 300_000_000}))
    refused(evaluate(copy, "mlra"), path, "num_hidden_layers")


@pytest.mark.parametrize("missing", ["n_layer", "vocab_size", "n_embd"])
def test_a_missing_key_is_no_traceback(copy: Path, missing: str) -> None:
    """GPT-2's own defaults replace it, which the weights contradict."""
    path = copy / "single" / "config.json"
    values = json.loads(path.read_text())
    del values[missing]
    path.write_text(json.dumps(values))
    refused(run_tool("import_hf", copy / "single", copy / "made"), copy / "single")
    refused(evaluate(copy, "single"), copy / "single")


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], {"a": 1}, {"a": "../other.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}, {"\x1b[2J": None}],
)
def test_an_index_that_is_no_table_of_files_is_refused(copy: Path, weight_map: Any) -> None:
    path = copy / SHARDED / INDEX
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for ran in (
        evaluate(copy, SHARDED),
        run_tool("tev", copy / SHARDED),
        run_tool("import_hf", copy / SHARDED, copy / "made"),
    ):
        refused(ran, path, "weight_map")


def test_text_of_tokens_cannot_move_the_cursor(copy: Path) -> None:
    (copy / "single" / "tokenizer.json").unlink()
    vocabulary = json.loads((copy / "single" / "vocab.json").read_text())
    codes = {f"\x1b[2J\x9b{number}": number for number in vocabulary.values()}
    (copy / "single" / "vocab.json").write_text(json.dumps(codes))
    ran = run_tool("tev", copy / "single", "--extremes", "2")
    assert ran.code == 0 and ran.stdout.replace("\n", "").isprintable() and "x9b" in ran.stdout
    (copy / "single" / "vocab.json").write_text('{"a": [1]}')
    refused(run_tool("tev", copy / "single", "--extremes", "2"), copy / "single" / "vocab.json")


def test_true_is_no_number_of_tokens(copy: Path) -> None:
    path = copy / "single" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": True}))
    report = json.loads(run_tool("tev", copy / "single", "--json").stdout)
    assert report["embeddings"][0]["num_tokens"] == report["embeddings"][0]["rows"] > 1
