"""The file of a study: its grid, and that all mistakes are reported at once."""

from pathlib import Path

import pytest
import torch

from mlra_scale.config import ConfigError, load_config
from mlra_scale.model.initialization import initial_std
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.study.grid import Cell, Study, cell_name, cells_of, load_study
from tests.support.layouts import initial_state

ROOT = Path(__file__).resolve().parents[3]
STUDIES = sorted((ROOT / "docs" / "studies").glob("*.yaml"))
SMALL = """
name: small
preset: debug
data: data/x
base: {wandb.mode: disabled, train.steps: 9}
variants:
  dense: {model.attention: dense}
  mlra:
axes:
  model.num_layers: [2, 4]
  optim.lr: [1e-3, 3e-3]
seeds: [1, 2]
"""


def study(tmp_path: Path, text: str, *overrides: str) -> Study:
    (tmp_path / "study.yaml").write_text(text)
    return load_study(tmp_path / "study.yaml", overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        cells_of(study(tmp_path, text, *overrides))
    return str(caught.value).splitlines()


def test_the_grid_is_every_combination_once(tmp_path: Path) -> None:
    cells = cells_of(study(tmp_path, SMALL))
    assert [cell.index for cell in cells] == list(range(16))
    assert len({cell.name for cell in cells}) == 16
    points = {(cell.variant, cell.axes["model.num_layers"], cell.axes["optim.lr"], cell.seed) for cell in cells}
    assert points == {(v, d, lr, s) for v in ("dense", "mlra") for d in (2, 4) for lr in (1e-3, 3e-3) for s in (1, 2)}
    # Pairs are neighbours, and a whole grid of one seed comes before the next seed.
    assert [cell.name for cell in cells[:3]] == [
        "dense-L2-lr0.001-seed1",
        "mlra-L2-lr0.001-seed1",
        "dense-L2-lr0.003-seed1",
    ]
    assert [cell.seed for cell in cells] == [1] * 8 + [2] * 8


def test_a_cell_is_what_its_command_line_says(tmp_path: Path) -> None:
    for cell in cells_of(study(tmp_path, SMALL, "optim.weight_decay=0.0")):
        config = load_config("debug", overrides=cell.overrides)
        assert config == cell.config
        assert (config.model.attention, config.model.num_layers) == (cell.variant, cell.axes["model.num_layers"])
        assert (config.optim.lr, config.train.seed) == (cell.axes["optim.lr"], cell.seed)
        assert (config.data.path, config.train.steps, config.optim.weight_decay) == ("data/x", 9, 0.0)
        assert cell.tokens == 9 * 8 * 64


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("[]", ["study = '{file}': must hold name:"]),
        ("a: [", ["study = '{file}': line 1"]),
        (SMALL.replace("variants", "variant"), ["variants = None: is required", "did you mean 'variants'?"]),
        (SMALL.replace("small", "a/b"), ["name = 'a/b': is part of file names"]),
        (SMALL.replace("preset: debug", "preset: debgu"), ["preset = 'debgu': unknown preset; did you mean 'debug'?"]),
        (SMALL.replace("[1, 2]", "[1, -2]"), ["seeds.1 = -2: must be >= 0"]),
        (SMALL.replace("[1, 2]", "[]"), ["seeds = []: is empty"]),
        (SMALL.replace("[1, 2]", "[1, 1]"), ["seeds = [1, 1]: holds a seed twice"]),
        (SMALL.replace("[2, 4]", "[]"), ["axes.model.num_layers = []: is empty"]),
        (SMALL.replace("[1e-3, 3e-3]", "[1e-3, 0.001]"), ["gives two cells of one name"]),
        (SMALL.replace("[1e-3, 3e-3]", f"[{'1' * 160}]"), ["makes a file name of"]),
        (SMALL.replace("  mlra:", "  'm l':"), ["variants = 'm l': is part of file names"]),
        (SMALL.replace("train.steps: 9", "train.seed: 9"), ["base: train.seed = 9: is set by seeds as well"]),
        (SMALL.replace("train.steps: 9", "optim.lr: 9"), ["base: optim.lr = 9: is set by axes as well"]),
        (SMALL.replace("train.steps: 9", "data.path: y"), ["base: data.path = 'y': is set by data as well"]),
        (SMALL.replace("dense}", "dense, optim.lr: 1}"), ["variants.dense: optim.lr = 1: is set by axes as well"]),
        (
            SMALL.replace("train.steps: 9", "optim.rules: [{kind: factor, lr_factor: 2}, {names: no.*, lr_factor: 2}]"),
            [f"optim.rules.{index} = " for index in (0, 1)]
            + [f"(in cell {variant}-L2-lr0.001-seed1 and 7 more)" for variant in ("dense", "mlra")],
        ),
        (SMALL + "ranks: 3\n", ["train.global_batch_size = 8", "(in every cell)"]),
    ],
)
def test_mistakes_are_reported(tmp_path: Path, text: str, lines: list[str]) -> None:
    found = "\n".join(problems(tmp_path, text))
    for line in lines:
        assert line.format(file=tmp_path / "study.yaml") in found


def test_all_cells_are_checked_and_named(tmp_path: Path) -> None:
    text = SMALL.replace("dense}", "dense, model.attention_init: matched, optim.lrr: 2}")
    text = text.replace("[2, 4]", "[2, 0]").replace("mlra:", "mlra: {model.num_heads: 7}")
    assert problems(tmp_path, text) == [
        "optim.lrr = 2: unknown key 'lrr'; did you mean 'lr'? (in cell dense-L2-lr0.001-seed1 and 7 more)",
        "model.num_heads = 7: model.hidden_size 64 is not divisible by it; use one of 1, 2, 4, 8, 16, 32, 64 "
        "(in cell mlra-L2-lr0.001-seed1 and 3 more)",
        "model.num_layers = 0: must be >= 1 (in cell dense-L0-lr0.001-seed1 and 7 more)",
    ]


def test_overrides_join_what_all_cells_share(tmp_path: Path) -> None:
    changed = study(tmp_path, SMALL, "train.steps=5", "data.path=data/y")
    assert (changed.base["train.steps"], changed.data) == (5, "data/y")
    assert {cell.config.data.path for cell in cells_of(changed)} == {"data/y"}
    for override, line in [
        ("optim.lr=1", "override: optim.lr = 1: is set by axes as well"),
        ("model.attention=mlra", "override: model.attention = 'mlra': is set by variants.dense as well"),
        ("train.seed=1", "override: train.seed = 1: is set by seeds as well"),
        ("train.steps", "override = 'train.steps': must look like"),
        ("train.steps=[", "train.steps = '[': is not YAML"),
        ("train.stepz=1", "train.stepz = 1: unknown key 'stepz'; did you mean 'steps'? (in every cell)"),
    ]:
        assert problems(tmp_path, SMALL, override)[0].startswith(line)


def test_the_resolved_study_reads_back_equal(tmp_path: Path) -> None:
    resolved = study(tmp_path, SMALL, "train.steps=5", 'wandb.name="1e3"', "optim.betas=[0.8, 0.9]")
    again = study(tmp_path, resolved.to_yaml())
    assert again == resolved
    assert cells_of(again) == cells_of(resolved)
    assert cells_of(again)[0].config.wandb.name == "1e3"


def test_names_are_stable_and_safe() -> None:
    axes = {"model.num_layers": 48, "optim.lr": 3e-4, "model.hidden_size": 64, "optim.weight_decay": 0}
    assert cell_name("mlra", axes, 7) == "mlra-L48-lr0.0003-D64-weight_decay0-seed7"
    assert cell_name("a", {"optim.lr": 1e-5}, 0) == "a-lr1e-05-seed0"
    assert cell_name("a", {"optim.weight_decay": 1.0}, 0) == cell_name("a", {"optim.weight_decay": 1}, 0)
    assert cell_name("a", {"optim.betas": [0.9, 0.95], "data.path": "/x/y z"}, 0) == "a-betas0.9_0.95-path_x_y_z-seed0"
    assert cell_name("a", {"tev.every": 1, "gradients.every": 2}, 0) == "a-tev.every1-gradients.every2-seed0"
    assert cell_name("a", {"guard.enabled": True, "data.seed": None}, 0) == "a-enabledtrue-seednull-seed0"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_docs_can_be_run(path: Path) -> None:
    found = load_study(path)
    assert found.name == path.stem
    cells = cells_of(found)
    if len({cell.config.model.attention for cell in cells}) > 1:
        assert {"dense", "control", "mlra"} <= {cell.variant for cell in cells}, "no comparison without the control"
    assert all(cell.config.data.seed is None for cell in cells)


def test_the_variants_of_a_seed_are_paired() -> None:
    """They begin with the same weights wherever shapes agree: the control's are those of dense in another size."""
    cells = [cell for cell in cells_of(load_study(ROOT / "docs" / "studies" / "init.yaml")) if _is_small(cell)]
    models = {cell.variant: cell.config.model.model_copy(update={"num_layers": 2}) for cell in cells}
    assert set(models) == {"dense", "control", "mlra", "mlra-matched"}
    states = {variant: initial_state(model, cells[0].seed) for variant, model in models.items()}
    tables = {variant: ParameterTable(model) for variant, model in models.items()}
    compared = 0
    for variant in ("control", "mlra", "mlra-matched"):
        for name, tensor in states[variant].items():
            if name not in states["dense"] or tensor.shape != states["dense"][name].shape:
                continue
            stds = [initial_std(models[v], tables[v][name]) for v in (variant, "dense")]
            scale = stds[0] / stds[1] if stds[1] else 1.0
            torch.testing.assert_close(tensor, states["dense"][name] * scale, rtol=1e-6, atol=0.0)
            compared += scale != 1.0
    # q, k and v of both blocks of the control are scaled; everything else is the same, digit for digit.
    assert compared == 6


def _is_small(cell: Cell) -> bool:
    return cell.axes["model.num_layers"] == 12 and cell.seed == 1


def test_a_study_exports_nothing(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, SMALL, "export.format=gpt2")
    assert "export.format" in problem and "is not for studies" in problem and "(in every cell)" in problem
