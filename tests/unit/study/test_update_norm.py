"""The measurement of product updates: planted updates of known size are measured, and a wrong one breaks the bound."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

from docs.studies.update_norm.__main__ import main
from docs.studies.update_norm.recorder import factors_of, measured
from docs.studies.update_norm.report import LARGEST_C, OPTIMIZERS, file_of, report
from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import other_factor, update_rules
from mlra_scale.parallel.fragments import Fragment

RATE, DECAY = 1e-2, 0.1
CONFIG = Config.from_dict(
    {
        "model": {"vocab_size": 16, "max_positions": 4, "num_layers": 2, "hidden_size": 16, "num_heads": 2},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 4},
        "optim": {"lr": RATE, "name": "spectron", "weight_decay": DECAY},
    }
)
TABLE = ParameterTable(CONFIG.model)
ETA = 0.2 * 16**0.5 * RATE


class Weights:
    """What the recorder asks of an engine."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table, self.topology = TABLE, SimpleNamespace(world_size=1)
        self.rules = update_rules(CONFIG.model, CONFIG.optim)
        self.of = {name: 0.2 * torch.randn(info.shape, generator=generator) for name, info in TABLE.items()}

    def owned_fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, weight.view(-1)) for name, weight in self.of.items()]

    def move(self, rho_of: Any, length: float = 1.0) -> None:
        """Moves every factor by rho times a matrix whose singular values are all `length`, and decays it."""
        generator = torch.Generator().manual_seed(1)
        for name, info in TABLE.items():
            if info.kind == "factor":
                u, _, v = torch.linalg.svd(torch.randn(info.shape, generator=generator), full_matrices=False)
                self.of[name] = (1.0 - RATE * DECAY) * self.of[name] - rho_of(name) * length * (u @ v)


def estimates_of(engine: Any, share: float = 1.0) -> dict[str, float]:
    return {name: share * float(torch.linalg.svdvals(weight)[0]) for name, weight in factors_of(engine).items()}


def spectron_step(share: float = 1.0, length: float = 1.0) -> dict[str, Any]:
    engine: Any = Weights()
    before, estimates = factors_of(engine), estimates_of(engine, share)
    engine.move(lambda name: ETA / (estimates[name] + estimates[other_factor(name)] + 1.0), length)
    return measured(engine, before, RATE, estimates)


def test_an_exact_update_keeps_the_bound() -> None:
    found = spectron_step()
    assert found["c"] == pytest.approx(1.0, abs=1e-4) and found["estimate_share"] == pytest.approx(1.0, abs=1e-6)
    assert 0.05 < found["bound_share"] <= 1.0 and found["update"] < ETA == pytest.approx(found["eta"])
    assert 0.0 < found["median_update"] <= found["update"] and found["rho"] < ETA


def test_what_is_off_is_told() -> None:
    """Underestimated norms enlarge the step, and overshooting momenta show in c; the stated bound holds for both."""
    off, longer = spectron_step(share=0.5), spectron_step(length=1.2)
    assert off["estimate_share"] == pytest.approx(0.5, abs=1e-6) and off["rho"] > spectron_step()["rho"]
    assert longer["c"] == pytest.approx(1.2, abs=1e-3)
    assert max(off["bound_share"], longer["bound_share"]) <= 1.0


def test_updates_that_are_too_long_break_the_bound() -> None:
    """With the c of the update itself the bound would hold for any of them."""
    assert spectron_step(length=1.3)["c"] > LARGEST_C and spectron_step(length=5.0)["bound_share"] > 1.0


def test_newton_schulz_stays_below_the_constant() -> None:
    optim, values = CONFIG.optim, torch.linspace(0.0, 1.0, 100_001, dtype=torch.float64)
    a, b, c = optim.newton_schulz_coefficients
    for _ in range(optim.newton_schulz_steps):
        values = a * values + b * values**3 + c * values**5
    assert 1.2 < values.max() < LARGEST_C - 0.005


def test_other_optimizers_have_no_bound_and_decay_is_no_update() -> None:
    engine: Any = Weights()
    before = factors_of(engine)
    assert set(before) == {name for name, info in TABLE.items() if info.kind == "factor"}
    for name in before:
        engine.of[name] = (1.0 - RATE * DECAY) * engine.of[name]
    assert measured(engine, before, RATE, {})["update"] < 1e-6  # fp32 weights; with the decay it is 0.002 |W|
    engine.of["blocks.1.attention.k.up.weight"] += 0.5
    found = measured(engine, before, RATE, {})
    expected = 0.5 * torch.ones(16, 8).double() @ before["blocks.1.attention.k.down.weight"]
    assert found["update"] == pytest.approx(float(torch.linalg.svdvals(expected)[0]), rel=1e-5)
    assert found["median_update"] < 1e-6 and "bound_share" not in found


@pytest.mark.parametrize("code", [0, 5])
def test_only_a_run_that_has_ended_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("mlra_scale.train.main", lambda words: code)
    file = tmp_path / "updates.jsonl"
    assert main(["--train", str(file)]) == code and file.exists() is (code == 0)


def test_a_quick_run_does_not_stand_in_for_a_run_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Path] = []

    def fail(output: Path, *_: Any) -> int:
        outputs.append(output)
        return 1

    monkeypatch.setattr("docs.studies.update_norm.__main__.train_one", fail)
    assert main(["--quick", "--rates", "1e-2"]) == main(["--rates", "1e-2"]) == 1
    assert len(outputs) == 6 and not set(outputs[:3]) & set(outputs[3:])


def test_the_report_has_the_extremes_of_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("commit", "hardware"):  # they start processes
        monkeypatch.setattr(f"docs.studies.update_norm.report.{name}", lambda: None)
    runs = [(optimizer, rate) for rate in (3e-3, 1e-2) for optimizer in OPTIMIZERS]
    for optimizer, rate in runs:
        file = file_of(tmp_path, optimizer, rate)
        file.parent.mkdir()
        lines = []
        for step in range(1, 5):
            values = {"update": step * rate, "median_update": rate, "eta": 2.0 * rate, "sigma": 1.0 + step}
            if optimizer == "spectron":
                values |= {"bound_share": 0.5 + 0.1 * step, "c": 1.1, "estimate_share": 1.0 / step, "rho": rate}
            lines.append(json.dumps({"step": step, "learning_rate": rate, **values}) + "\n")
        file.write_text("".join(lines))
    summary = report(tmp_path, runs)["summary"]
    assert summary["adamw 0.003"]["largest_update_over_eta"] == 2.0 and summary["muon 0.01"]["last_sigma"] == 5.0
    assert summary["spectron 0.01"]["largest_bound_share"] == pytest.approx(0.9)
    assert summary["spectron 0.01"]["smallest_estimate_share"] == 0.25
    assert "| spectron 0.01 |" in (tmp_path / "update_norm.md").read_text()
    assert len(json.loads((tmp_path / "update_norm.json").read_text())["curves"]["muon 0.003"]["update"]) == 4
    assert (tmp_path / "update-norm.png").read_bytes()[1:4] == b"PNG"
