"""The study of product updates with real training: Spectron's bound holds at every step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training_runs import ROOT, environment


@pytest.mark.slow
def test_the_bound_holds_at_every_step_of_a_run(tmp_path: Path, training_data: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")
    output = tmp_path / "norms"
    fields = [f"data.path={training_data}", "model.vocab_size=512", "train.steps=8"]
    command = [sys.executable, "-m", "docs.studies.update_norm", "--quick", "--rates", "1e-2", "--output", str(output)]
    done = subprocess.run(
        [*command, *fields], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    curves = json.loads((output / "update_norm.json").read_text())["curves"]
    assert set(curves) == {"adamw 0.01", "muon 0.01", "spectron 0.01"}
    found = curves["spectron 0.01"]
    assert len(found["bound_share"]) == 8 and max(found["bound_share"]) <= 1.0
    # Five iterations end between 0.68 and 1.21; a power iteration never overestimates.
    assert 0.68 < min(found["c"]) <= max(found["c"]) <= 1.21 and max(found["estimate_share"]) <= 1.0 + 1e-5
    for updates, eta, spectron in zip(curves["adamw 0.01"]["update"], found["eta"], found["update"], strict=True):
        assert spectron < eta < updates
