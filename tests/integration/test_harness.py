"""lm-evaluation-harness on an exported folder with a local task, offline: its sums are ours."""

import json
import math
import re
from pathlib import Path

import pytest

from mlra_scale.checkpoint.huggingface.importing import import_gpt2
from mlra_scale.evaluation.models import open_model
from mlra_scale.evaluation.perplexity import perplexity
from mlra_scale.evaluation.texts import PieceEncoder
from tests.support.gpt2_folders import TEXT, gpt2_folder, tokenizer
from tests.support.harness import NEED, run_harness
from tests.support.tools import run_tool

POSITIONS = 32
pytest.importorskip("lm_eval", reason=NEED)
pytest.importorskip("accelerate", reason=NEED)


def two_windows() -> str:
    """A text of exactly two windows: for other lengths the harness gives the last window more context than we do."""
    encode = tokenizer().tokenizer.encode
    ends = [end for end in range(len(TEXT)) if len(encode(TEXT[:end]).ids) == 2 * POSITIONS]
    return TEXT[: ends[-1]]


@pytest.mark.slow
def test_the_harness_finds_the_same(tmp_path: Path) -> None:
    import_gpt2(gpt2_folder(tmp_path / "gpt2"), tmp_path / "made", rank=16)
    exported = run_tool("export_hf", tmp_path / "made", tmp_path / "exported", "--no-verify")
    assert exported.code == 0, exported.stderr
    ran = run_harness(tmp_path, tmp_path / "exported", [two_windows()])
    texts = [json.loads(line)["text"] for line in (tmp_path / "local_text.jsonl").read_text().splitlines()]
    opened = open_model(tmp_path / "made", device="cpu")
    encoder, start = PieceEncoder(tokenizer()), tokenizer().end_of_document_token
    ours = [
        perplexity(opened, [[encoder.piece(text)]], POSITIONS + 1, POSITIONS, start_token=start).negative_log_likelihood
        for text in texts
    ]
    theirs = ran.log_likelihoods
    assert [theirs[text] for text in texts] == pytest.approx([-nats for nats in ours], rel=1e-6)
    figures = ran.figures
    # It counts the pieces between white space, empty ones at the ends included.
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert figures["word_perplexity,none"] == pytest.approx(math.exp(sum(ours) / words), rel=1e-4)

    measured = run_tool(
        "evaluate",
        tmp_path / "made",
        "--text",
        tmp_path / "local_text.jsonl",
        "--start-token",
        "--window",
        POSITIONS + 1,
        "--stride",
        POSITIONS,
        "--batch-size",
        4,
        "--json",
    )
    assert measured.code == 0, measured.stderr
    found = json.loads(measured.stdout)
    assert found["negative_log_likelihood"] == pytest.approx(sum(ours), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(figures["bits_per_byte,none"], rel=1e-5)
