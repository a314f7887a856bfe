"""The reading of very deep runs: a loss that is not finite is seen, and so is growth that is not linear."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

from docs.studies.thousand.__main__ import figure, main
from mlra_scale.study.grid import load_study

STUDY = Path(__file__).resolve().parents[3] / "docs" / "studies" / "thousand.yaml"
DEPTHS = (250, 500, 1000)


def write(folder: Path, seconds: Any, losses: Any = lambda step: 8.0 - 0.01 * step) -> Path:
    lines = []
    for depth in DEPTHS:
        run = folder / "cells" / f"mlra-L{depth}"
        run.mkdir(parents=True)
        records = []
        for step in range(1, 51):
            record: dict[str, Any] = {
                "step": step,
                "loss": losses(step),
                "gradient_norm": 1.0,
                "memory_gib": depth / 1000,
            }
            record |= {"consumed_tokens": 128 * step, "tokens_per_second": 128 / seconds(depth)}
            if step % 25 == 0:  # measuring takes time
                norms = [0.1 * (1 + block) for block in range(depth)]
                record |= {"tokens_per_second": 1.0, "gradients": {"layers": {"gradient_norm": norms}}}
            if step >= 25:
                record["memory_gib"] += 1e-6 * depth**2
            records.append(json.dumps(record) + "\n")
        (run / "metrics.jsonl").write_text("".join(records))
        cell = {"cell": run.name, "variant": "mlra", "axes": {"model.num_layers": depth}, "seed": 1, "state": "done"}
        lines.append(json.dumps({**cell, "run": f"cells/{run.name}"}) + "\n")
    (folder / "results.jsonl").write_text("".join(lines))
    return folder


def test_linear_growth_and_norms_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "sweep", lambda depth: 0.25 + 0.002 * depth)
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "thousand.json").read_text())
    assert [cell["seconds_per_step"] for cell in result["cells"]] == pytest.approx([0.75, 1.25, 2.25])
    assert result["growth"]["mlra"] == pytest.approx(
        {"seconds_per_step": 1.0, "memory_gib": 1.0, "memory_with_statistics_gib": 2.5 / 1.75}
    )
    assert len(result["cells"][-1]["gradient_norms"]) == 1000
    text = capsys.readouterr().out
    assert "| mlra | 1,000 | 50 | yes | 7.500 | 2.250 | 1.000 | 2.000 | 0.1 to 1e+02 |" in text
    assert "| mlra | 1.00 | 1.00 | 1.43 |" in text
    assert (tmp_path / "out" / "gradient-norms.png").read_bytes()[1:4] == b"PNG"


def test_a_loss_that_is_not_finite_and_quadratic_growth_are_seen(tmp_path: Path) -> None:
    folder = write(tmp_path / "sweep", lambda depth: 1e-6 * depth**2, lambda step: None if step == 7 else 8.0)
    assert main([str(folder)]) == 1
    result = json.loads((folder / "thousand.json").read_text())
    assert not any(cell["is_finite"] for cell in result["cells"])
    assert result["growth"]["mlra"]["seconds_per_step"] == pytest.approx(2.0)
    planned = {"variants": {"mlra": {}}, "axes": {"model.num_layers": [*DEPTHS, 2000]}, "seeds": [1]}
    (good := write(tmp_path / "part", lambda depth: 0.002 * depth)).joinpath("sweep.yaml").write_text(
        json.dumps(planned)
    )
    assert main([str(good)]) == 1 and "**1 cells of the study have no result.**" in (good / "thousand.md").read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 2


def test_no_two_options_of_a_plot_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    study, drawn = load_study(STUDY), []
    monkeypatch.setattr(
        "docs.studies.thousand.__main__.style.curve", lambda *args: drawn.append((id(args[0]), args[3]))
    )
    assert figure([{"variant": name, "depth": 1000, "gradient_norms": [1.0, 2.0]} for name in study.variants])
    assert len(drawn) == len(study.variants) == 17
    assert not any(one == other for index, one in enumerate(drawn) for other in drawn[:index])


def test_the_document_names_what_the_study_varies() -> None:
    text = (STUDY.parent / "thousand" / "README.md").read_text()
    fields = {field.rsplit(".", 1)[-1] for values in load_study(STUDY).variants.values() for field in values}
    assert {field for field in fields if field not in text} == set()
