"""The study that combines techniques: its sweeps follow from the screening, and planted effects are found."""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

from docs.studies.combine.__main__ import main
from docs.studies.combine.analysis import Sweeps, analyse, best_losses, left_out_best_losses, report
from docs.studies.combine.protocol import ARMS, DEPTHS, HYPOTHESES, MARGIN, RATES, RATES_DEPTH, SEEDS
from docs.studies.combine.sweeps import SweepError, best_rates, choose
from docs.studies.combine.text import as_markdown
from mlra_scale.study.grid import cells_of, load_study
from mlra_scale.study.report.sweep_record import open_sweep

ROOT = Path(__file__).resolve().parents[3]
STUDY = ROOT / "docs" / "studies" / "combine.yaml"
SCREENED = (1e-3, 3.16e-3, 1e-2, 3.16e-2)
Value = Callable[[str, int, float, int], float]


def line(arm: str, depth: int, rate: float | None, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    axes = {"model.num_layers": depth} | ({} if rate is None else {"optim.lr": rate})
    cell = f"{arm}-{depth}-{rate}-{seed}"
    found = {"cell": cell, "variant": arm, "axes": axes, "seed": seed, "run": f"cells/{cell}", "state": "done"}
    values = {"initial_loss": 8.3, "final_loss": loss, "validation_loss": loss, "tev_mean": 0.1, "tev_std": 0.01}
    return found | values | {"largest_logit": 10.0, "largest_qk_singular_value": 1.0} | more


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    return folder


def screening(folder: Path, best: Callable[[str], int] = lambda arm: 2) -> Path:
    """All arms at four rates, lowest at the given index."""
    arms = list(load_study(STUDY).variants)
    lines = [line(arm, 24, SCREENED[i], 1, 6.0 + 0.1 * abs(i - best(arm))) for arm in arms for i in range(4)]
    write(folder, lines)
    (folder / "sweep.yaml").write_text(load_study(STUDY).to_yaml())
    return folder


def sweeps(folder: Path, value: Value, **more: Callable[[str, float, int], float]) -> tuple[Path, Path, Path]:
    """Three finished sweeps; `value` is the loss of an arm, depth, rate and seed."""
    rates = [
        line(arm, RATES_DEPTH, rate, seed, value(arm, RATES_DEPTH, rate, seed))
        | {key: of(arm, rate, seed) for key, of in more.items()}
        for seed in SEEDS
        for rate in RATES
        for arm in ARMS
    ]
    depths = [
        line(arm, depth, None, seed, value(arm, depth, 0.0, seed)) for seed in SEEDS for depth in DEPTHS for arm in ARMS
    ]
    return screening(folder / "a"), write(folder / "b", rates), write(folder / "c", depths)


def noise(*key: Any) -> float:
    """Of 0.003 nats, the same for the same key."""
    return 0.003 * float(np.random.default_rng(zlib.crc32(repr(key).encode())).standard_normal())


def result_of(folders: tuple[Path, Path, Path]) -> dict[str, Any]:
    return analyse(Sweeps(*map(open_sweep, folders)))


def verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["verdict"] for item in result["hypotheses"]}


def test_the_document_holds_the_hypotheses_and_numbers_of_the_code() -> None:
    text = (STUDY.parent / "combine" / "README.md").read_text()
    rows = re.findall(r"^\| (H\d+) \| (.+?): (\S+) - (\S+) \| (\S+) \|", text, re.M)
    stated = [(item.name, item.quantity, item.first, item.second, item.sign) for item in HYPOTHESES]
    written = []
    for (name, quantity, first, second, sign), item in zip(rows, HYPOTHESES, strict=True):
        if item.quantity == "loss at depth":
            assert quantity == f"loss at {item.depth} blocks"
            quantity = "loss at depth"
        written.append((name, quantity, first, second, sign.strip("*")))
    assert written == stated
    assert f"within {MARGIN} nats" in text and all(f"`{arm}`" in text for arm in ARMS)
    study = load_study(STUDY)
    assert f"| 1, screening | all {len(study.variants)} | 24 |" in text and set(ARMS) <= set(study.variants)
    assert [rate for rate in SCREENED if rate not in RATES] == [] and study.axes["optim.lr"] == [*SCREENED]
    assert not set(study.seeds) & set(SEEDS), "the screening would choose rates by the seeds that test them"


def test_the_stages_are_made_from_the_screening(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"dense": 0, "mlra-spectron": 3}
    folder = screening(tmp_path / "runs", lambda arm: best.get(arm, 2))
    assert main(["choose", str(folder)]) == 0
    files = choose(folder)
    assert capsys.readouterr().out == "".join(f"python tools/sweep.py {file} --jobs 2\n" for file in files.values())
    rates, depths = (cells_of(load_study(file)) for file in files.values())
    assert len(rates) == len(ARMS) * len(RATES) * len(SEEDS) and len(depths) == len(ARMS) * len(DEPTHS) * len(SEEDS)
    assert {cell.variant for cell in rates} == {cell.variant for cell in depths} == set(ARMS)
    assert {cell.config.model.num_layers for cell in rates} == {RATES_DEPTH}
    for cell in depths:
        assert cell.config.optim.lr == SCREENED[best.get(cell.variant, 2)]
        assert cell.config.model.num_layers in DEPTHS and cell.config.optim.warmup_steps == 30
    undecayed = next(cell.config.optim for cell in rates if cell.variant == "mlra-undecayed")
    assert [rule.weight_decay for rule in undecayed.rules] == [0.0, 0.0]
    assert next(cell.config.optim.name for cell in rates if cell.variant == "mlra-spectron") == "spectron"


def test_the_best_rate_is_the_lowest_and_diverged_runs_are_none(tmp_path: Path) -> None:
    lines = [line(arm, 24, rate, 1, 6.0) for arm in ARMS for rate in SCREENED]  # all equal: the lowest rate
    lines += [line("dense", 24, 3.16e-2, 1, 5.0, state="diverged"), line("mlra", 24, 1e-2, 1, 5.9)]
    write(tmp_path, lines)
    found = best_rates(open_sweep(tmp_path))
    assert found["dense"] == found["control"] == 1e-3 and found["mlra"] == 1e-2
    lines += [line("mlra-muon", 24, rate, 1, 6.0, state="diverged") for rate in SCREENED]
    lines += [line("dense-muon", 24, 1e-2, 1, 6.0, state="failed")]
    write(tmp_path, lines)
    with pytest.raises(SweepError, match="dense-muon: 3 of 4 rates have a result; mlra-muon: every rate diverged"):
        best_rates(open_sweep(tmp_path))


def test_a_screening_in_progress_names_no_rates(tmp_path: Path) -> None:
    folder = screening(tmp_path)
    lines = [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]
    write(folder, [item for item in lines if item["axes"]["optim.lr"] != SCREENED[-1]])
    with pytest.raises(SweepError, match="dense: 3 of 4 rates have a result"):
        choose(folder)


def test_the_best_rate_is_that_of_all_seeds_or_of_the_others() -> None:
    """Seed a is lucky at the second rate; the others say that the first one is best."""
    losses = pd.DataFrame({1e-3: [5.9, 5.5, 5.6], 1e-2: [5.0, 5.8, 5.9]}, index=["a", "b", "c"])
    assert best_losses(losses).to_dict() == {"a": 5.0, "b": 5.8, "c": 5.9}
    # Without b, and without c, the mean of the second rate is the lower one.
    assert left_out_best_losses(losses).to_dict() == {"a": 5.9, "b": 5.8, "c": 5.9}
    # A diverged run is never chosen for the others; where they choose its rate, its seed has no value.
    losses.loc["b", 1e-2] = np.nan
    assert best_losses(losses).to_dict() == {"a": 5.9, "b": 5.5, "c": 5.6}
    found = left_out_best_losses(losses)
    assert (found["a"], found["c"]) == (5.9, 5.6) and np.isnan(found["b"])


def test_a_seed_with_a_missing_run_chooses_no_rate(tmp_path: Path) -> None:
    """A run that failed is not one that diverged: it says nothing about its rate."""
    folders = sweeps(tmp_path, planted)
    expected = result_of(folders)["arms"]["dense"]["values"]["best loss, 48 blocks"]
    lines = [json.loads(text) for text in (folders[1] / "results.jsonl").read_text().splitlines()]
    best = min(RATES, key=lambda rate: sum(planted("dense", RATES_DEPTH, rate, seed) for seed in SEEDS))
    for item in lines:
        if (item["variant"], item["axes"]["optim.lr"], item["seed"]) == ("dense", best, SEEDS[0]):
            item |= {"state": "failed", "validation_loss": None}
    write(folders[1], lines)
    result = result_of(folders)
    found, hypothesis = result["arms"]["dense"], result["hypotheses"][0]
    assert found["missing"] == 1 and hypothesis["n"] == 4 and hypothesis["verdict"] == "supported"
    assert found["values"]["best loss, 48 blocks"]["value"] == pytest.approx(expected["value"], abs=0.05)
    # Nothing is chosen, and no error raised, where every seed lacks a run.
    write(folders[1], [item for item in lines if item["variant"] != "dense" or item["axes"]["optim.lr"] != best])
    assert result_of(folders)["hypotheses"][0]["n"] == 0


def planted(arm: str, depth: int, rate: float, seed: int) -> float:
    """Muon and Spectron are 0.2 lower, AdamW goes bad at high rates, MLRA under AdamW at a lower one than dense."""
    is_adamw = "muon" not in arm and "spectron" not in arm
    loss = 5.9 + 0.2 * is_adamw + noise(arm, depth, rate, seed) + 0.05 * (seed % 3)
    limit = {"dense": 1e-2, "control": 1e-2}.get(arm, 3.16e-3) if is_adamw else 3.16e-2
    return loss + 0.5 * (rate > 1.01 * limit) + (0.1 if arm == "mlra-muon" and rate > 0.03 else 0.0)


def test_planted_effects_are_found_and_no_others(tmp_path: Path) -> None:
    folders = sweeps(
        tmp_path,
        planted,
        tev_mean=lambda arm, rate, seed: (0.14 if arm == "mlra-undecayed" else 0.1) * (1 + noise(arm, rate, seed)),
        largest_logit=lambda arm, rate, seed: (
            {"mlra": 90.0, "mlra-spectron": 3.0}.get(arm, 20.0) + seed % 2 + noise(arm)
        ),
        largest_qk_singular_value=lambda arm, rate, seed: (8.0 if arm == "mlra-spectron" else 9.0) + noise(arm, seed),
    )
    result = report(folders, tmp_path / "report")
    found = verdicts(result)
    assert {name: found[name] for name in found if found[name] != "supported"} == {}
    differences = {item["name"]: item["value"] for item in result["hypotheses"]}
    assert differences["H1"] == pytest.approx(-0.2, abs=0.01) and differences["H12"] == pytest.approx(0.146, abs=0.01)
    assert json.loads((tmp_path / "report" / "combine.json").read_text()) == json.loads(json.dumps(result))
    text = (tmp_path / "report" / "combine.md").read_text()
    assert text == as_markdown(result) and "| H12 | TEV: mlra-undecayed - mlra | higher | +0.14" in text
    assert result["arms"]["mlra"]["losses"]["0.01"] == pytest.approx(6.65, abs=0.02)
    section = text.split("## Loss over rate of the arms of H7 and H8")[1].split("##")[0]
    assert "no claim about stability" in " ".join(section.split())
    assert "H7 and H8](optimizers-over-rates.png)" in section
    assert re.findall(r"^\| (mlra\S*) \|", section, re.M) == ["mlra", "mlra-muon", "mlra-spectron"]
    for name in (
        "optimizers-over-rates.png",
        "loss-over-rates.png",
        "logit-over-rates.png",
        "singular-value-over-rates.png",
    ):
        assert (tmp_path / "report" / name).read_bytes()[1:4] == b"PNG"


def test_the_sensitivity_is_that_of_the_validation_loss(tmp_path: Path) -> None:
    """Training losses that do not depend on the rate change nothing."""
    sensitivity = "sensitivity, 48 blocks"
    expected = result_of(sweeps(tmp_path / "a", planted))["arms"]["mlra"]["values"][sensitivity]
    found = result_of(sweeps(tmp_path / "b", planted, final_loss=lambda *_: 5.0))["arms"]["mlra"]["values"][sensitivity]
    assert found == expected and found["value"] == pytest.approx(0.3, abs=0.02)  # 0.5 at three of five rates


def test_nothing_is_claimed_from_noise_and_the_reverse_is_called_so(tmp_path: Path) -> None:
    # Of 30 such sweeps one had a false claim, as Holm's method allows in one of 20.
    flat = verdicts(result_of(sweeps(tmp_path / "flat", lambda *key: 6.0 + noise(0, *key))))
    for item in HYPOTHESES:
        is_loss = item.quantity in ("best loss", "sensitivity", "loss at depth")
        assert flat[item.name] == ("supported" if item.sign == "none" else "undecided") or not is_loss, item
    # What does not vary at all, as TEV and logits here, is no evidence.
    assert flat["H12"] == flat["H9"] == "undecided"

    def reversed_(arm: str, depth: int, rate: float, seed: int) -> float:
        return planted({"mlra-muon": "mlra", "mlra": "mlra-muon"}.get(arm, arm), depth, rate, seed)

    found = verdicts(result_of(sweeps(tmp_path / "reverse", reversed_)))
    assert found["H2"] == "the reverse" and found["H1"] == "supported" and found["H5"] == "refuted"


def test_a_run_that_diverged_takes_its_seed_away_but_counts_in_the_sensitivity(tmp_path: Path) -> None:
    folders = sweeps(tmp_path, planted)
    lines = [json.loads(text) for text in (folders[1] / "results.jsonl").read_text().splitlines()]
    for item in lines:
        if (item["variant"], item["axes"]["optim.lr"], item["seed"]) == ("mlra", 1e-1, SEEDS[0]):
            item |= {"state": "diverged", "final_loss": None, "validation_loss": None}
    write(folders[1], lines)
    result = result_of(folders)
    counts = {(item["quantity"], item["first"]): item["n"] for item in result["hypotheses"]}
    assert counts["largest logit", "mlra"] == 4 and counts["sensitivity", "mlra"] == counts["best loss", "mlra"] == 5
    assert result["arms"]["mlra"]["diverged"] == 1 and result["arms"]["mlra"]["losses"]["0.1"] is None


def test_what_is_not_there_is_an_error_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["choose", str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert main(["report", *[str(tmp_path)] * 3, "--output", str(tmp_path / "out")]) == 2
    assert "holds no results" in capsys.readouterr().err and not (tmp_path / "out").exists()
