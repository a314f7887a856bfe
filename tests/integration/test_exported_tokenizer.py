"""A run on text of a foreign tokenizer that adds <s> in a plain call: the export gives the ids that were trained on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mlra_scale.checkpoint.huggingface.tokenizer import EncodedText
from mlra_scale.checkpoint.retention import checkpoint_at
from mlra_scale.config import Config
from mlra_scale.data.indexed import open_indexed
from mlra_scale.data.tokenizer import load_tokenizer
from mlra_scale.data.writer import SplitWriter
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.texts import document_tokens
from mlra_scale.evaluation.verification_text import validation_documents
from tests.support.foreign_tokenizers import CORPUS, begins_with_bos, save
from tests.support.harness import NEED, run_harness
from tests.support.pool import WorkerPool
from tests.support.tools import run_tool
from tests.support.training_runs import main_on_rank
from tests.unit.data.builders import prepare_texts

POSITIONS = 32
MODEL = ("model.vocab_size=300", "model.num_layers=2", "train.sequence_length=32", f"model.max_positions={POSITIONS}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("foreign")
    tokenizer = save(begins_with_bos(), place / "tokenizer", tokenizer_class="PreTrainedTokenizerFast")
    options = {"tokenizer": [str(tokenizer)], "validation_fraction": 0.1, "workers": 1}
    return prepare_texts(place / "data", CORPUS * 3, **options)


@pytest.fixture(scope="module")
def run(data: Path, worker_pool: Callable[[int], WorkerPool]) -> Path:
    arguments = ("train.steps=4", "train.log_every=4", "checkpoint.every=4", "optim.warmup_steps=1", *MODEL)
    folder = data.parent / "run"
    command = ("--preset", "debug", "--run-dir", str(folder), f"data.path={data}", *arguments)
    (finished,) = worker_pool(1).run(main_on_rank, command)
    assert finished.code == 0, finished.stderr
    return folder


def data_ids(data: Path) -> list[list[int]]:
    files = open_indexed(str(data / "validation"))
    return [document_tokens(files, files.tokens(), number)[:-1] for number in range(files.num_documents)]


@pytest.mark.parametrize("more", [(), ("--no-verify",), ("--format", "mlra")], ids=["gpt2", "unverified", "mlra"])
def test_a_plain_call_gives_the_ids_of_the_data(run: Path, data: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    result = run_tool("export_hf", run, tmp_path / "out", *more)
    assert result.code == 0 and result.stderr == "", result.stderr
    assert "post-processor (<s>) is left out" in result.stdout
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    documents = data_ids(data)
    assert len(documents) > 5 and [loaded(loaded.decode(ids)).input_ids for ids in documents] == documents
    # The same tokenizer adds <s> where it was not prepared.
    assert AutoTokenizer.from_pretrained(data.parent / "tokenizer")(CORPUS[0]).input_ids[0] == 0
    assert loaded.bos_token_id == loaded.eos_token_id == 1


@pytest.mark.slow
def test_the_harness_finds_our_bits_per_byte(run: Path, tmp_path: Path) -> None:
    """By the recipe of docs/evaluation.md; with <s> before each text they were a tenth higher."""
    pytest.importorskip("lm_eval", reason=NEED)
    pytest.importorskip("accelerate", reason=NEED)
    assert run_tool("export_hf", run, tmp_path / "exported").code == 0
    ran = run_harness(tmp_path, tmp_path / "exported", CORPUS[:6], is_only_these=True)
    recipe = (
        "--text",
        tmp_path / "local_text.jsonl",
        "--start-token",
        "--window",
        POSITIONS + 1,
        "--stride",
        POSITIONS,
    )
    for model in (run, tmp_path / "exported"):
        measured = run_tool("evaluate", model, *recipe, "--json")
        assert measured.code == 0, measured.stderr
        found = json.loads(measured.stdout)
        assert found["documents"] == 6
        assert found["negative_log_likelihood"] == pytest.approx(-sum(ran.log_likelihoods.values()), rel=1e-6)
        assert found["bits_per_byte"] == pytest.approx(ran.figures["bits_per_byte,none"], rel=1e-5)


def test_a_tokenizer_that_was_changed_after_training_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    """Two ids swapped: every text would be gibberish, and decoding and encoding again would still agree."""
    copy = tmp_path / "step-00000004"
    shutil.copytree(checkpoint_at(run), copy)
    file = copy / "tokenizer" / "tokenizer.json"
    text = file.read_text()
    e, t = (re.search(rf'"{letter}": (\d+)', text) for letter in "et")
    assert e and t
    swapped = text.replace(e[0], f'"e": {t[1]}').replace(t[0], f'"t": {e[1]}')
    assert len(swapped) == len(text) and json.loads(swapped)["model"]["vocab"]["e"] == int(t[1])
    file.write_text(swapped)
    for more in ((), ("--no-verify",)):
        result = run_tool("export_hf", copy, tmp_path / "out", "--no-checksums", *more)
        assert result.code == 2 and "is not the one of training" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_named_tokenizer_with_other_merges_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    """It has the same tokens under the same numbers, and splits words otherwise."""
    content = json.loads(begins_with_bos().to_str())
    content["model"]["merges"].pop(0)
    other = data.parent / "tokenizer" / "tokenizer_config.json"
    (tmp_path / "other").mkdir()
    shutil.copy(other, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    result = run_tool("export_hf", run, tmp_path / "out", "--tokenizer", tmp_path / "other")
    assert result.code == 1 and "its tokenizer is not that of training" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_data_of_a_megatron_pair_that_hold_the_added_token(run: Path, data: Path, tmp_path: Path) -> None:
    """Megatron's own preparation calls the tokenizer plainly: the export then does so, too."""
    loaded = load_tokenizer([str(data.parent / "tokenizer")])
    ids = [loaded.tokenizer.encode(line).ids for line in CORPUS]
    assert ids[0][0] == 0
    writer = SplitWriter(tmp_path / "pair", np.dtype(np.uint16))
    for document in ids:
        writer.add(np.array([*document, 1], np.uint16), np.array([len(document) + 1], np.int32))
    writer.finish()
    config = Config.from_yaml((run / "config.yaml").read_text())
    pair = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(tmp_path / "pair"), "end_of_document_token": 1})}
    )
    documents = validation_documents(pair, loaded, 200)
    assert documents[0] == EncodedText(CORPUS[-1], ids[-1], True) and len(documents) > 3
    other = load_tokenizer([str(data / "tokenizer" / "tokenizer.json")], "<s>")
    with pytest.raises(EvaluationError, match=r"documents of .* end with token 1, the tokenizer .* ends texts with 0"):
        validation_documents(config, other, 200)


def test_the_card_of_a_resumed_run_tells_what_was_changed(
    run: Path, data: Path, tmp_path: Path, worker_pool: Callable[[int], WorkerPool]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    command = ("--preset", "debug", "--run-dir", str(copy), "--resume", "auto", f"data.path={data}", *MODEL)
    changes = ("train.steps=6", "optim.lr=1.5e-4", "train.global_batch_size=4", "train.log_every=2")
    (finished,) = worker_pool(1).run(main_on_rank, (*command, *changes))
    assert finished.code == 0, finished.stderr
    assert run_tool("export_hf", copy, tmp_path / "out", "--no-verify").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    first = Config.from_yaml((run / "config.yaml").read_text())
    assert f"| 5 | optim.lr | {first.optim.lr} | 0.00015 |" in card, card
    assert f"| 5 | train.global_batch_size | {first.train.global_batch_size} | 4 |" in card
    assert "| 5 | train.steps | 4 | 6 |" in card and "train.log_every" not in card and "not recorded" not in card
    assert "| learning rate | 0.00015, " in card and "(last of several: see the changes below)" in card
    assert run_tool("export_hf", run, tmp_path / "unchanged", "--no-verify").code == 0
    assert "Changed in the course" not in (tmp_path / "unchanged" / "README.md").read_text()
