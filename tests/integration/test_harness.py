"""lm-evaluation-harness on an exported folder with a local task, offline: its sums are ours."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlra_scale.checkpoint.huggingface.importing import import_gpt2
from mlra_scale.evaluation.models import open_model
from mlra_scale.evaluation.perplexity import perplexity
from mlra_scale.evaluation.texts import Encoder
from tests.support.gpt2_folders import TEXT, gpt2_folder, tokenizer
from tests.support.tools import run_tool
from tests.support.training_runs import environment

HARNESS = Path(__file__).parent / "harness"
POSITIONS = 32
NEED = "needs lm-evaluation-harness: pip install 'lm-eval[hf]==0.4.13'"
pytest.importorskip("lm_eval", reason=NEED)
pytest.importorskip("accelerate", reason=NEED)


def two_windows() -> str:
    """A text of exactly two windows: for other lengths the harness gives the last window more context than we do."""
    encode = tokenizer().tokenizer.encode
    ends = [end for end in range(len(TEXT)) if len(encode(TEXT[:end]).ids) == 2 * POSITIONS]
    return TEXT[: ends[-1]]


def test_the_harness_finds_the_same(tmp_path: Path) -> None:
    import_gpt2(gpt2_folder(tmp_path / "gpt2"), tmp_path / "made", rank=16)
    exported = run_tool("export_hf", tmp_path / "made", tmp_path / "exported", "--no-verify")
    assert exported.code == 0, exported.stderr
    for file in HARNESS.iterdir():
        shutil.copy(file, tmp_path)
    with (tmp_path / "local_text.jsonl").open("a") as lines:
        lines.write(json.dumps({"text": two_windows()}) + "\n")
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        "pretrained=exported,dtype=float32",
    ]
    command += ["--tasks", "local_text", "--include_path", ".", "--device", "cpu", "--batch_size", "3"]
    command += ["--output_path", "results", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    # The harness needs nothing of this project.
    clean = environment(PYTHONPATH=os.environ.get("PYTHONPATH", ""), **offline)
    ran = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]

    texts = [json.loads(line)["text"] for line in (tmp_path / "local_text.jsonl").read_text().splitlines()]
    opened = open_model(tmp_path / "made", device="cpu")
    encoder, start = Encoder(tokenizer()), tokenizer().end_of_document_token
    ours = [
        perplexity(opened, [[encoder.piece(text)]], POSITIONS + 1, POSITIONS, start_token=start).negative_log_likelihood
        for text in texts
    ]
    (samples,) = (tmp_path / "results").rglob("samples_local_text*.jsonl")
    theirs = {item["doc"]["text"]: float(item["filtered_resps"][0]) for item in map(json.loads, samples.open())}
    assert [theirs[text] for text in texts] == pytest.approx([-nats for nats in ours], rel=1e-6)
    (summary,) = (tmp_path / "results").rglob("results_*.json")
    figures = json.loads(summary.read_text())["results"]["local_text"]
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
