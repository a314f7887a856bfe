"""What commit 3a017c2 wrote is read, resumed and continued to the same digits: tests/fixtures/written_by_3a017c2.

The files stand for what users have on their disks: they are never made again by newer code (make.sh there tells how
they were made). A change of a stored format converts them on reading.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlra_scale.checkpoint import Store
from tests.distributed.test_golden import machine
from tests.support.pool import WorkerPool
from tests.support.tools import run_tool
from tests.support.training_runs import main_on_rank, metrics

WRITTEN = Path(__file__).resolve().parents[1] / "fixtures" / "written_by_3a017c2"
MODEL = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "train.sequence_length=32"]
LAYOUTS = {
    "pipeline": ["parallel.pipeline=2", "model.sigma_reparam=true", "model.qk_norm=true"],
    "zero3": ["train.precision=bf16", "--ds-config", "ds_configs/zero3.json"],
}
TIMING = {"seconds", "tokens_per_second", "memory_gib", "measuring_seconds", "mfu", "data_seconds"}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A copy of the files: a resume writes into its run directory."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    return tmp_path / "written"


def numbers(record: Any, prefix: str = "") -> dict[str, Any]:
    """Every number of a record by its path, without what depends on the clock."""
    if isinstance(record, dict):
        parts = [numbers(value, f"{prefix}/{key}") for key, value in record.items() if key not in TIMING]
        return {name: value for part in parts for name, value in part.items()}
    if isinstance(record, list):
        return numbers(dict(enumerate(record)), prefix)
    return {prefix: record}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_continued_to_the_same_digits(
    written: Path, worker_pool: Callable[[int], WorkerPool], layout: str
) -> None:
    """Both engines, fp32 and bf16, with dropout, options of the model, the guard and every measurement."""
    run = written / layout
    command = ["--preset", "debug", "--run-dir", str(run), "--resume", "auto", "train.steps=6", *MODEL]
    command += ["train.log_every=1", f"data.path={written / 'data'}", *LAYOUTS[layout]]
    for rank, result in enumerate(worker_pool(2).run(main_on_rank, tuple(command))):
        assert result.code == 0, (rank, result.stderr[-4000:])
        assert ("has version 1 of the format and is read as version 3" in result.stdout) == (rank == 0)
    expected = [json.loads(line) for line in (written / f"{layout}-continued.jsonl").read_text().splitlines()]
    found = {record["step"]: numbers(record) for record in metrics(run)}
    assert list(found) == [record["step"] for record in expected] == list(range(7))
    for record in expected:
        then, now = numbers(record), found[record["step"]]
        assert then.keys() <= now.keys(), then.keys() - now.keys()
        same = [now[name] for name in then]
        if machine() == (WRITTEN / "machine.txt").read_text().strip():
            assert dict(zip(then, same, strict=True)) == then
        else:
            # On another machine sums have another order. bf16 rounds them to 2^-8, in each of three updates.
            rtol = {"pipeline": 1e-3, "zero3": 2.0**-6}[layout]
            np.testing.assert_allclose(
                np.array(same, np.float64), np.array(list(then.values()), np.float64), rtol=rtol, atol=1e-5
            )


def test_checkpoints_are_verified_described_and_exported(written: Path, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        assert Store.open(written / layout / "checkpoints" / "step-00000003").verify() == []
        for action in ("list", "verify"):
            result = run_tool("checkpoints", action, written / layout)
            assert result.code == 0 and "step-00000003" in result.stdout, result.stderr
    # The data lie elsewhere than when the checkpoint was written.
    text = ["--tokenizer", written / "data" / "tokenizer", "--text", WRITTEN.parents[2] / "README.md"]
    result = run_tool("export_hf", written / "zero3", tmp_path / "out", *text)
    assert result.code == 0, result.stderr
    exported, before = (folder / "model.safetensors" for folder in (tmp_path / "out", WRITTEN / "exported-gpt2"))
    assert exported.read_bytes() == before.read_bytes()


@pytest.mark.parametrize("kind", ["gpt2", "mlra"])
def test_exports_are_evaluated_and_continue_a_text(written: Path, kind: str) -> None:
    """Both forms of one checkpoint, and the checkpoint itself, have one perplexity."""
    losses = []
    for model in (written / f"exported-{kind}", written / "zero3"):
        options = ["--data", written / "data", "--max-tokens", 500, "--json", "--trust-remote-code"]
        result = run_tool("evaluate", model, *options)
        assert result.code == 0, result.stderr
        losses.append(json.loads(result.stdout)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_report_of_the_run_is_drawn(written: Path, tmp_path: Path) -> None:
    result = run_tool("report", written / "pipeline", "--output", tmp_path / "page")
    assert result.code == 0, result.stderr
