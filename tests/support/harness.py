"""lm-evaluation-harness in a process of its own, offline, on a task over local lines of JSON."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.training_runs import environment

HARNESS = Path(__file__).resolve().parents[1] / "integration" / "harness"
NEED = "needs lm-evaluation-harness: pip install 'lm-eval[hf]==0.4.13'"


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found."""

    log_likelihoods: dict[str, float]  # of each text, in nats
    figures: dict[str, Any]  # of the task: word_perplexity,none and bits_per_byte,none among others


def run_harness(place: Path, folder: Path, more_texts: list[str], is_only_these: bool = False) -> HarnessResult:
    """Measures the log-likelihood of local_text.jsonl in `place`, which is made there from the harness's own."""
    for file in HARNESS.iterdir():
        shutil.copy(file, place)
    lines = place / "local_text.jsonl"
    kept = "" if is_only_these else lines.read_text()
    lines.write_text(kept + "".join(json.dumps({"text": text}) + "\n" for text in more_texts))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "local_text", "--include_path", "."]
    command += ["--device", "cpu", "--batch_size", "3", "--output_path", "results", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "cache")}
    # The harness needs nothing of this project.
    clean = environment(PYTHONPATH=os.environ.get("PYTHONPATH", ""), **offline)
    ran = subprocess.run(command, cwd=place, env=clean, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (samples,) = (place / "results").rglob("samples_local_text*.jsonl")
    found = {item["doc"]["text"]: float(item["filtered_resps"][0]) for item in map(json.loads, samples.open())}
    (summary,) = (place / "results").rglob("results_*.json")
    return HarnessResult(found, json.loads(summary.read_text())["results"]["local_text"])
