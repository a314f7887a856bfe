"""tools/tev.py as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT, tool
from tests.unit.stability.test_tev_folder import VOCABULARY, llama


def test_report_for_people(tmp_path: Path) -> None:
    llama(tied=False).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({f"word{i}": i for i in range(VOCABULARY)}))
    done = subprocess.run(
        [*tool("tev"), str(tmp_path), "--extremes", "3"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "input embedding model.embed_tokens.weight: 53 tokens x 16, float32" in done.stdout
    assert "untied head lm_head.weight" in done.stdout
    assert done.stdout.count("TEV mean") == 2 and done.stdout.count('"word') == 12


def test_the_tool_starts_without_the_training_libraries() -> None:
    code = (
        "import sys, mlra_scale.stability.tev_folder; "
        "print([name for name in ('deepspeed', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
