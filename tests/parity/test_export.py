"""Exports of what real engines trained: each layout once, the kinds of attention in turn (all: all_exports.py)."""

from pathlib import Path
from typing import Any

import pytest

from tests.parity.export_matrix import ATTENTIONS, LAYOUTS, Pools, run_case

# Every layout, every attention at every tensor-parallel degree or engine: a Latin square.
CASES = [
    ("tp1, pipeline of 2 stages", "MLRA"),
    ("tp2, pipeline of 2 stages", "o factorised"),
    ("tp4, pipeline engine", "dense"),
    ("tp1, ZeRO-3 over 2", "o factorised"),
    ("tp2, ZeRO-3 over 2", "dense"),
    ("tp4, ZeRO-3", "MLRA"),
]


def test_the_subset_covers_the_matrix() -> None:
    assert {layout for layout, _ in CASES} == set(LAYOUTS)
    for place in ("tp1", "tp2", "tp4", "pipeline", "ZeRO-3"):
        covered = {attention for layout, attention in CASES if place in layout}
        assert len(covered) >= 2 and (place.startswith("tp") or covered == set(ATTENTIONS)), place


@pytest.mark.slow_except("tp2, pipeline of 2 stages-o factorised", "tp2, ZeRO-3 over 2-dense")
@pytest.mark.parametrize(("layout", "attention"), CASES)
def test_exports_give_the_engines_logits(tmp_path: Path, worker_pool: Pools, layout: str, attention: str) -> None:
    outcome = run_case(worker_pool, tmp_path, LAYOUTS[layout], **ATTENTIONS[attention])
    assert max(outcome.gpt2, outcome.mlra) < 1e-4


OWN_DEPTH_RULE: dict[str, Any] = {"model__layer_norm_scaling": True}
COMPLETEP: dict[str, Any] = {"model__depth_rule": "completep", "model__base_depth": 3}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [OWN_DEPTH_RULE, COMPLETEP], ids=["layer-norm-scaling", "completep"])
@pytest.mark.parametrize("attention", ["MLRA", "o factorised"])
def test_options_fold_into_the_exports_of_a_run(
    tmp_path: Path, worker_pool: Pools, attention: str, rule: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"model__sigma_reparam": True, "model__embedding_scale": "sqrt_width", **rule}
    layout = LAYOUTS["tp2, pipeline of 2 stages"]
    outcome = run_case(worker_pool, tmp_path, layout, **ATTENTIONS[attention], **options)
    assert max(outcome.gpt2, outcome.mlra) < 1e-4


def test_a_run_in_bfloat16_with_dropout_exports_its_fp32_weights(tmp_path: Path, worker_pool: Pools) -> None:
    rates: dict[str, Any] = {"model__residual_dropout": 0.1, "model__attention_dropout": 0.1}
    layout = LAYOUTS["tp2, pipeline of 2 stages"]
    outcome = run_case(worker_pool, tmp_path, layout, train__precision="bf16", **rates)
    # Each export equals the fp32 weights to 1e-4 (it was verified); the engine itself computes in bfloat16.
    assert 1e-4 < outcome.gpt2 < 5e-2 and 1e-4 < outcome.mlra < 5e-2
