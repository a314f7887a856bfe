"""Reading what is there: torn lines, missing files, values that are none."""

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pandas", reason="needs pandas (the extra report)")

from mlra_scale.cluster.runs import read_run
from mlra_scale.config import load_config
from mlra_scale.study.report.records import RunRecord, open_run, series
from mlra_scale.study.report.run_report import _optimizer
from mlra_scale.study.report.sweep_record import is_sweep, open_sweep, setting_text, value_text
from mlra_scale.training.run_reader import is_number, last_values, read_lines
from tests.support.study_folders import cell_of, write_lines, write_run, write_sweep

MISSING = "metrics.jsonl cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    ("content", "is_optional", "notes"),
    [
        (b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo', False, []),
        (
            b'{"step": 1}\n[1, 2]\n{"st\n\n\xff\xfe\n{"step": 2, "loss": NaN}\n',
            False,
            ["metrics.jsonl: 3 line(s) are no JSON objects and are left out"],
        ),
        (None, True, []),
        (None, False, [MISSING]),
    ],
    ids=["torn", "no objects", "optional", "missing"],
)
def test_lines_are_read_as_far_as_they_are_objects(
    tmp_path: Path, content: bytes | None, is_optional: bool, notes: list[str]
) -> None:
    file, found = tmp_path / "metrics.jsonl", list[str]()
    if content is not None:
        file.write_bytes(content)
    assert [record["step"] for record in read_lines(file, found, is_optional)] == ([] if content is None else [1, 2])
    assert found == notes
    # The last values stop at the newest line that has them.
    assert last_values(file, ("step",), []) == ({} if content is None else {"step": 2})


def test_an_empty_folder_is_a_run_without_a_record(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert (run.metrics, run.events, run.last_step, run.state) == ([], [], 0, "unknown")
    assert len(run.notes) == 3 and MISSING in run.notes


def test_a_stored_configuration_is_read_in_the_form_of_its_version(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    for content in ("train: {steps: 20}\n", "version: 2\ntrain: {steps: 20}\n"):
        config.write_text(content)
        assert open_run(tmp_path).config == {"train": {"steps": 20}} and read_run(tmp_path, 0.0).steps == 20
    config.write_text("version: 9\ntrain: {steps: 20}\n")
    (note,) = (note for note in open_run(tmp_path).notes if "config.yaml" in note)
    assert note.startswith("config.yaml cannot be read (version = 9: the file was written by a newer program")
    row = read_run(tmp_path, 0.0)
    assert row.steps is None and row.unreadable == [note]


def test_the_optimizer_is_named_with_its_rules_where_the_configuration_can_be_read() -> None:
    rules = ["optim.name=spectron", "optim.rules=[{kind: embedding, weight_decay: 0}]"]
    config = load_config("debug", overrides=rules).to_dict()
    text = _optimizer(RunRecord(Path("x"), config=config))
    assert text is not None and text.startswith(
        "spectron for 24 factors, muon for 12 matrices, AdamW (betas 0.9, 0.95; "
    )
    assert text.endswith("; rules: kind embedding: weight decay 0")
    plain = _optimizer(RunRecord(Path("x"), config=load_config("debug").to_dict()))
    assert plain == "AdamW (betas 0.9, 0.95; epsilon 1e-08)"
    assert _optimizer(RunRecord(Path("x"), config={"optim": 3})) is None


def test_values_are_read_by_their_path() -> None:
    records = [
        {"step": 1, "a": {"b": 2.0}, "tev_quantiles": {"0.05": 1.0}, "layers": [3.0, 4.0, *[9.0] * 6]},
        {"step": 2, "a": {"b": None}, "tev_quantiles": None},
        {"step": 3, "a": "text", "layers": []},
        {"step": 4, "a": {"b": True}, "layers": [None, 2.0]},
    ]
    run = RunRecord(Path("x"), metrics=records)
    found = run.series("a.b")
    assert found.index.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(found, [2.0, math.nan, math.nan])
    assert run.series(("tev_quantiles", "0.05")).tolist() == [1.0]
    shallow = series(records, "layers", np.linalg.norm)
    assert shallow.index.tolist() == [1, 4]
    # The first quarter of 8 blocks, and of 2 blocks the first one, which was not finite.
    np.testing.assert_array_equal(shallow, [5.0, math.nan])
    assert run.series("nothing").empty
    assert [is_number(value) for value in (True, math.inf, math.nan, 10**400, "1", 0)] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "unknown"),
        (["start", "finished", "start"], "in progress, or ended without an event"),
        (["start", "finished"], "finished"),
        (["start", "preempted"], "preempted"),
        (["start", ("stopped", 3)], "diverged: loss or gradient norm was not finite"),
        (["start", ("stopped", 7)], "diverged: the guard gave up"),
        (["start", ("stopped", 4)], "stopped: why"),
        (["start", ("failed", 1)], "failed: why"),
    ],
)
def test_the_state_is_that_of_the_newest_start(events: list[str | tuple[str, int]], state: str) -> None:
    made = [
        {"event": event} if isinstance(event, str) else {"event": event[0], "exit_code": event[1], "reason": "why"}
        for event in events
    ]
    assert RunRecord(Path("x"), events=made).state == state


def test_a_run_reads_back(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    assert (run.last_step, run.state, run.notes) == (300, "finished", [])
    assert run.setting("model.num_layers") == 12 and run.setting("model.none", "default") == "default"
    assert {record["rollback"] for record in run.rolled_back} == {1}
    assert len(run.events_named("guard_skip", "guard_rollback")) == 2


def test_a_sweep_reads_back(tmp_path: Path) -> None:
    sweep = open_sweep(write_sweep(tmp_path / "sweep", {"zebra": 0.0, "ant": 0.0}, seeds=(2, 10), record_steps=0))
    assert sweep.variants == ["zebra", "ant"]
    assert sweep.axes == {"model.num_layers": [24, 48], "optim.lr": [3e-4, 1e-3, 3e-3, 1e-2]}
    assert (len(sweep.cells), sweep.num_planned, sweep.seeds, sweep.notes) == (32, 32, ["2", "10"], [])
    assert sweep.settings()[0] == "depth (blocks) 24, learning rate 0.0003"
    assert sweep.settings("optim.lr") == ["depth (blocks) 24", "depth (blocks) 48"]
    assert is_sweep(tmp_path / "sweep") and not is_sweep(tmp_path)


def test_the_later_line_of_a_cell_counts_and_one_that_diverged_has_no_final_value(tmp_path: Path) -> None:
    lines = [cell_of("a", {}, 1, state="failed", final_loss=None), cell_of("a", {}, 1, final_loss=5.0)]
    lines.append(cell_of("a", {}, 2, state="diverged", final_loss=9.0))
    write_lines(tmp_path / "results.jsonl", [*lines, {"cell": "no variant"}])
    sweep = open_sweep(tmp_path)
    np.testing.assert_array_equal(sweep.cells["final training loss"], [5.0, math.nan])
    assert sweep.cells.state.tolist() == ["done", "diverged"] and sweep.cells.initial_loss.tolist() == [10.8, 10.8]
    assert "results.jsonl: 1 line(s) without variant or state are left out" in sweep.notes


def test_equal_places_on_the_axes_are_equal_texts() -> None:
    assert setting_text({"b": 1e-3, "a": 48.0}) == setting_text({"a": 48, "b": 0.001}) == "a 48, b 0.001"
    assert setting_text({}) == "the one setting"
    shown = [value_text(value) for value in (0.1 + 0.2, True, "x", [1], None)]
    assert shown == ["0.30000000000000004", "true", "x", "[1]", "null"]
