"""Results: what is read from a run's record, and that no writer loses what another one wrote."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.study.grid import Cell, cells_of, load_study
from mlra_scale.study.results import (
    CellFiles,
    SweepDirectory,
    changes_of,
    ending_of,
    events_of,
    result_of,
    state_of,
    write_result,
)

STUDY = """
name: s
preset: debug
base: {train.steps: 40}
variants: {dense: {model.attention: dense}, mlra: }
seeds: [1, 2, 3, 4, 5, 6, 7, 8]
"""


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    (tmp_path / "s.yaml").write_text(STUDY)
    return cells_of(load_study(tmp_path / "s.yaml"))


@pytest.fixture
def files(tmp_path: Path, cells: list[Cell]) -> CellFiles:
    found = SweepDirectory(tmp_path / "out").files(cells[0])
    found.run.path.mkdir(parents=True)
    return found


def write_lines(path: Path, *objects: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(item) + "\n" for item in objects)


def test_a_result_is_read_from_the_record(files: CellFiles) -> None:
    loss = {step: 7.0 - 0.01 * step * step for step in range(1, 41)}
    write_lines(
        files.run.metrics, {"step": 0, "seconds": 0.25, "tev_mean": 0.5, "tev_std": 0.1, "validation_loss": 7.1}
    )
    for step in range(1, 41):
        # Started again after step 20.
        line: dict[str, Any] = {"step": step, "seconds": 0.5 * step if step <= 20 else 0.25 * step, "loss": loss[step]}
        if step == 10:  # the largest of the whole run count
            line |= {"activations": {"max_logit": 20.0}, "gradients": {"layers": {"qk_spectral_norm": [7.0, None]}}}
        if step == 40:
            line |= {"validation_loss": 3.5, "tev_mean": 0.25, "tev_std": 0.05}
        write_lines(files.run.metrics, line)
    write_lines(
        files.run.metrics,
        {
            "step": 40,
            "seconds": 10.5,
            "spike_scores": {"loss_olmo_core": 3 / 40},
            "gradients": {
                "kinds": {"embedding": {"gradient_variance": 1e-9}},
                "layers": {"gradient_variance": [1e-9, 3e-9, *[1.0] * 6], "qk_spectral_norm": [2.0, 3.0]},
            },
            "activations": {"residual_variance": [1.0, 2.0, 4.5], "max_logit": 8.0},
        },
    )
    for commit in ("first", "second", "first"):
        write_lines(files.run.events, {"event": "start", "commit": commit})
    result = result_of(files, "done", {"event": "finished", "steps": 40}, None, "abc")
    assert result.pop("final_loss") == pytest.approx(sum(loss[step] for step in (37, 38, 39, 40)) / 4, rel=1e-12)
    assert result == {
        "cell": "dense-seed1",
        "variant": "dense",
        "axes": {},
        "seed": 1,
        "run": "cells/dense-seed1",
        "state": "done",
        "steps": 40,
        "initial_loss": loss[1],
        "validation_loss": 3.5,
        "tev_mean": 0.25,
        "tev_std": 0.05,
        "gradient_variance_embedding": 1e-9,
        "gradient_variance_shallow": pytest.approx(2e-9),
        "residual_variance": 4.5,
        "largest_logit": 20.0,
        "largest_qk_singular_value": 7.0,
        "spikes": 3,
        "diverged_at": None,
        "seconds": 10.0 + 10.5,
        "tokens": 40 * 8 * 64,
        "error": None,
        "commit": "first, second",
    }


def test_the_result_of_a_run_that_diverged_ends_there(files: CellFiles) -> None:
    write_lines(
        files.run.metrics, *({"step": step, "seconds": float(step), "loss": float(step)} for step in range(1, 25))
    )
    write_lines(files.run.metrics, {"step": 25, "seconds": 25.0, "loss": None})
    ending = {"event": "stopped", "exit_code": 3, "step": 26}
    result = result_of(files, "diverged", ending, None, None)
    assert (result["steps"], result["diverged_at"], result["tokens"]) == (26, 26, 26 * 8 * 64)
    # The last tenth of 26 steps is 3: 24, and 25 and 26, of which there is no number.
    assert result["final_loss"] == 24.0
    assert "spikes" not in result and "gradient_variance_embedding" not in result
    json.dumps(result, allow_nan=False)


def test_a_run_that_recorded_nothing_has_a_result_too(files: CellFiles) -> None:
    result = result_of(files, "failed", {}, "exit code 1: why", None)
    assert (result["state"], result["steps"], result["final_loss"], result["error"]) == (
        "failed",
        0,
        None,
        "exit code 1: why",
    )


def test_rare_log_lines_give_the_last_one(files: CellFiles) -> None:
    write_lines(files.run.metrics, {"step": 1, "seconds": 1.0, "loss": 7.0}, {"step": 30, "seconds": 2.0, "loss": 5.0})
    write_lines(files.run.metrics, {"step": 40, "seconds": 3.0, "validation_loss": 5.0})
    assert result_of(files, "done", {}, None, None)["final_loss"] == 5.0


@pytest.mark.parametrize(
    ("events", "after", "state"),
    [
        ([], 0, None),
        ([{"event": "start"}], 0, None),
        ([{"event": "start"}, {"event": "finished"}], 0, "done"),
        ([{"event": "start"}, {"event": "finished"}, {"event": "start"}], 0, None),
        ([{"event": "start"}, {"event": "finished"}], 2, None),
        ([{"event": "start"}, {"event": "stopped", "exit_code": 3}], 0, "diverged"),
        ([{"event": "start"}, {"event": "stopped", "exit_code": 7}, {"event": "checkpoint"}], 0, "diverged"),
        ([{"event": "start"}, {"event": "stopped", "exit_code": 4}], 0, None),
        ([{"event": "start"}, {"event": "failed", "exit_code": 1}], 0, None),
        ([{"event": "start"}, {"event": "preempted", "exit_code": 5}], 0, None),
        ([{"event": "start"}, {"event": "preempted"}, {"event": "start"}, {"event": "finished"}], 2, "done"),
    ],
)
def test_the_end_is_what_the_events_say(
    files: CellFiles, events: list[dict[str, Any]], after: int, state: str | None
) -> None:
    write_lines(files.run.events, *events)
    assert len(events_of(files.run)) == len(events)
    assert state_of(ending_of(files.run, after)) == state


def test_results_are_collected_by_many_at_once(tmp_path: Path, cells: list[Cell]) -> None:
    """Every writer finishes cells and collects, as the tasks of an array do; a reader never sees half a file."""
    output = SweepDirectory(tmp_path / "out")

    def finish(cell: Cell) -> int:
        files = SweepDirectory(tmp_path / "out").files(cell)
        lock = files.lock()
        assert lock is not None
        with lock:
            write_result(files, result_of(files, "done", {}, None, None), keep_checkpoints=False)
            seen = {result["cell"] for result in SweepDirectory(tmp_path / "out").collect(cells)}
        assert cell.name in seen
        return len(output.results.read_text().splitlines())

    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(finish, reversed(cells)))
    assert max(lengths) == len(cells)
    lines = [json.loads(line)["cell"] for line in output.results.read_text().splitlines()]
    assert lines == [cell.name for cell in cells]


def test_a_cell_is_held_by_one(files: CellFiles) -> None:
    lock = files.lock()
    assert lock is not None and files.lock() is None
    lock.close()
    again = files.lock()
    assert again is not None
    again.close()


def test_only_a_failed_cell_keeps_its_checkpoints(files: CellFiles) -> None:
    step = files.run.checkpoints / "step-1"
    for state, keep, stays in (("failed", False, True), ("done", True, True), ("diverged", False, False)):
        step.mkdir(parents=True, exist_ok=True)
        write_result(files, {"state": state}, keep_checkpoints=keep)
        assert step.exists() == stays
        assert files.is_done() == (state != "failed")


def test_a_link_to_checkpoints_elsewhere_stays(files: CellFiles, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "step-1").mkdir(parents=True)
    files.run.checkpoints.symlink_to(tmp_path / "elsewhere")
    write_result(files, {"state": "done"}, keep_checkpoints=False)
    assert (files.run.checkpoints / "step-1").exists()


def test_a_changed_configuration_is_found(tmp_path: Path, cells: list[Cell]) -> None:
    files = SweepDirectory(tmp_path / "out").files(cells[0])
    assert changes_of(files) == []
    files.run.path.mkdir(parents=True)
    files.run.config.write_text(cells[0].config.to_yaml())
    assert changes_of(files) == []
    # Where and how it is computed may change; what is computed may not.
    (tmp_path / "s.yaml").write_text(STUDY.replace("40", "40, wandb.mode: offline, train.micro_batch_size: 4"))
    same = cells_of(load_study(tmp_path / "s.yaml"))[0]
    assert same.config != cells[0].config and changes_of(CellFiles(same, files.run)) == []
    (tmp_path / "s.yaml").write_text(STUDY.replace("40", "50, optim.lr: 0.5, data.path: x"))
    other = cells_of(load_study(tmp_path / "s.yaml"))[0]
    assert [problem.field for problem in changes_of(CellFiles(other, files.run))] == [
        "cell dense-seed1: data.path",
        "cell dense-seed1: train.steps",
        "cell dense-seed1: optim.lr",
    ]
    text = "\n".join(map(str, changes_of(CellFiles(other, files.run))))
    assert "cell dense-seed1: optim.lr = 0.5: the cell ran with 0.003; name another --output, or remove" in text
    files.run.config.write_text("model: [")
    assert "cannot be read" in str(changes_of(files)[0])


def test_results_of_an_earlier_grid_are_named(files: CellFiles, tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path / "out")
    write_result(files, {"state": "done"}, keep_checkpoints=False)
    assert directory.stale([files.cell]) == []
    assert directory.stale([]) == [files.cell.name]
