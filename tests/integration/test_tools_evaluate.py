"""tools/evaluate.py on every kind of model and text, and the same text through lm-evaluation-harness."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mlra_scale.checkpoint.huggingface.importing import import_gpt2
from mlra_scale.config.text_tasks import NAMED_TEXTS, TextTask
from mlra_scale.data.tokenizer import save_tokenizer, train_bpe
from tests.support.gpt2_folders import TEXT, gpt2_folder, random_gpt2, tokenizer
from tests.support.tools import run_tool
from tests.unit.data.builders import prepare_texts

LINES = [*TEXT.splitlines(), "short one\n", " leading and trailing \n"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 folder, a run with two checkpoints of it, and text."""
    place = tmp_path_factory.mktemp("place")
    folder = gpt2_folder(place / "gpt2")
    import_gpt2(gpt2_folder(place / "other", seed=1), place / "run" / "checkpoints" / "step-00000001")
    import_gpt2(folder, place / "run" / "checkpoints" / "step-00000002")
    (place / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    (place / "whole.txt").write_text(TEXT)
    return place


def measured(*arguments: object) -> dict[str, Any]:
    result = run_tool("evaluate", *arguments, "--json")
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def nats(tokens: list[int]) -> float:
    """-ln p of all tokens but the first of a text that fits one window."""
    with torch.no_grad():
        scores = random_gpt2()(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
    return -float(scores[range(len(tokens) - 1), tokens[1:]].sum())


def test_the_figures_are_those_of_the_formulas(place: Path) -> None:
    found = measured(place / "gpt2", "--text", place / "lines.jsonl", "--window", 33, "--stride", 32)
    encoded = [tokenizer().tokenizer.encode(line).ids for line in LINES]
    short = measured(place / "gpt2", "--text", place / "lines.jsonl", "--max-tokens", 20)
    assert short["tokens_scored"] == 19 and short["negative_log_likelihood"] == pytest.approx(nats(encoded[0][:20]))
    assert found["documents"] == len(LINES)
    assert found["tokens_scored"] == sum(map(len, encoded)) - len(LINES)
    assert found["words"] == sum(len(line.split()) for line in LINES)
    assert found["bytes"] == sum(len(line) for line in LINES)
    total = found["negative_log_likelihood"]
    assert found["loss"] == total / found["tokens_scored"]
    assert found["token_perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["word_perplexity"] == pytest.approx(math.exp(total / found["words"]))
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["bytes"])


def test_a_checkpoint_is_the_folder_that_it_came_from(place: Path) -> None:
    options = ("--text", place / "whole.txt", "--stride", 8, "--batch-size", 3)
    expected = measured(place / "gpt2", *options)
    newest = place / "run" / "checkpoints" / "step-00000002"
    for path in (place / "run", place / "run" / "checkpoints", newest):
        found = measured(path, *options)
        assert found["model"] == str(newest)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert measured(place / "other", *options)["loss"] != pytest.approx(expected["loss"], rel=1e-3)
    half = measured(place / "gpt2", *options, "--dtype", "bfloat16")
    assert half["loss"] != expected["loss"] and half["loss"] == pytest.approx(expected["loss"], rel=0.05)


def test_exports_with_factors_need_no_foreign_code(place: Path, tmp_path: Path) -> None:
    import_gpt2(place / "gpt2", tmp_path / "made", rank=32)
    exported = run_tool("export_hf", tmp_path / "made", tmp_path / "out", "--format", "mlra", "--no-verify")
    assert exported.code == 0, exported.stderr
    # The project's own class is used, whatever the folder's file says.
    (tmp_path / "out" / "modeling_mlra.py").write_text("raise AssertionError('this ran')\n")
    found = measured(tmp_path / "out", "--text", place / "whole.txt")
    expected = measured(place / "gpt2", "--text", place / "whole.txt")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"model_type": "foreign"}))
    result = run_tool("evaluate", tmp_path / "out", "--text", place / "whole.txt")
    assert result.code == 2 and "allow it with --trust-remote-code" in result.stderr


def test_prepared_data_documents_and_streams(place: Path, tmp_path: Path) -> None:
    lines = [f"{line} {number}" for number in range(6) for line in TEXT.splitlines()]
    prepare_texts(tmp_path / "data", lines, tokenizer=(str(place / "gpt2"),), validation_fraction=0.5, workers=1)
    splits = [
        measured(place / "run", "--data", tmp_path / "data", "--split", split) for split in ("train", "validation")
    ]
    text = measured(place / "run", "--text", tmp_path / "data.jsonl")
    for name in ("documents", "tokens_scored", "words", "bytes", "negative_log_likelihood"):
        assert splits[0][name] + splits[1][name] == pytest.approx(text[name], rel=1e-6), name
    assert measured(place / "run", "--data", tmp_path / "data")["documents"] == splits[1]["documents"]
    joined = measured(place / "run", "--text", tmp_path / "data.jsonl", "--join")
    # Every first token but the stream's is scored too, and so is every end.
    assert joined["tokens_scored"] == text["tokens_scored"] + 2 * len(lines) - 1
    assert (joined["words"], joined["bytes"]) == (text["words"], text["bytes"])


def test_the_report_for_people(place: Path) -> None:
    result = run_tool("evaluate", place / "run", "--text", place / "whole.txt")
    assert result.code == 0 and result.stderr == ""
    for part in (
        "token perplexity",
        "word perplexity",
        "bits per byte",
        "1 document:",
        "windows of 32 tokens, stride 16",
    ):
        assert part in result.stdout


def test_wrong_input_is_one_message(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = ("--text", place / "whole.txt")
    (tmp_path / "empty.txt").write_text("")
    save_tokenizer(train_bpe(["quite another text " * 9], 270), tmp_path / "other")
    for arguments, message in (
        ((tmp_path / "nothing", *text), "does not exist"),
        ((tmp_path, *text), "holds no complete checkpoint"),
        ((place / "run",), "one of the arguments --text --data --task is required"),
        ((place / "run", "--text", tmp_path / "no.txt"), "does not exist"),
        ((place / "run", "--text", tmp_path / "empty.txt"), "there is nothing to score"),
        ((place / "run", "--data", tmp_path), "has no manifest.json"),
        ((place / "run", *text, "--window", 99), "use 2 to 33"),
        ((place / "run", *text, "--stride", 32), "use 1 to 31"),
        ((place / "run", *text, "--device", "cuda"), "there is no GPU here"),
        ((place / "run", *text, "--batch-size", 0), "--batch-size: '0' is not a whole number from 1 on"),
        ((place / "run", *text, "--tokenizer", tmp_path), "holds no tokenizer"),
        ((place / "run", *text, "--tokenizer", tmp_path / "other"), "its text would be gibberish"),
    ):
        result = run_tool("evaluate", *arguments)
        assert result.code == 2 and message in result.stderr, (message, result)
        assert result.stdout == ""


def test_a_named_text_says_what_is_scored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = ["a window slides over", "nothing is between them"]
    (place / "passages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    local = TextTask("lambada", str(place / "passages.jsonl"), is_last_word=True)
    monkeypatch.setitem(NAMED_TEXTS, "lambada", local)
    found = measured(place / "gpt2", "--task", "lambada", "--batch-size", 2)
    expected, scored = 0.0, 0
    for passage in passages:
        context, _, word = passage.rpartition(" ")
        before, last = (tokenizer().tokenizer.encode(text).ids for text in (context, f" {word}"))
        expected += nats(before + last) - (nats(before) if len(before) > 1 else 0.0)
        scored += len(last)
    assert found["negative_log_likelihood"] == pytest.approx(expected, rel=1e-6)
    assert found["tokens_scored"] == scored and found["words"] == 2 and found["text"] == ["lambada"]
    assert found["word_perplexity"] == pytest.approx(math.exp(expected / 2))
    refused = run_tool("evaluate", place / "gpt2", "--task", "lambada", "--join")
    assert refused.code == 2 and "a task says how it is read" in refused.stderr
