"""What a sweep, a report and a prediction make of damaged files: an error that names the file, or passing it over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from docs.studies.predict.analysis import predict
from docs.studies.predict.runs import PredictionError
from mlra_scale.cluster.job_file import JobFile
from mlra_scale.cluster.runs import read_run
from mlra_scale.config import ConfigError
from mlra_scale.study.grid import cells_of, load_study
from mlra_scale.study.provenance import note_end, note_start
from mlra_scale.study.report.records import event_text, open_run
from mlra_scale.study.report.run_report import checkpoints_text
from mlra_scale.study.report.sweep_record import open_sweep
from mlra_scale.study.results import CellFiles, SweepDirectory, changes_of, ending_of, events_of, result_of
from mlra_scale.training.record import cut_record, read_record

DEEP = "[" * 100_000 + "\n"
STUDY = "name: s\npreset: debug\nvariants: {dense: {model.attention: dense}}\nseeds: [1]\n"
DAMAGED = [
    DEEP,
    "[]\n[]\n",
    "1\n2\n",
    "null\nnull\n",
    '{"a": 1}\n{"a": 2}\n',
    '{"step": "x"}\n{"step": [[]]}\n',
    "\x00" * 99 + "\n\n",
]
RECORD: dict[str, Any] = {
    "step": 1,
    "loss": 2.0,
    "seconds": 1.0,
    "learning_rate": 0.1,
    "gradients": {"kinds": {"embedding": {"gradient_variance": 1.0}}, "layers": {"gradient_variance": [1.0, 1.0]}},
    "activations": {"residual_variance": [1.0], "max_logit": 1.0},
    "spike_scores": {"loss_olmo_core": 0.0},
}
BAD: tuple[Any, ...] = (None, [], {}, "x", [[]], True, {"kinds": 1, "residual_variance": 1, "loss_olmo_core": "x"})


@pytest.fixture
def files(tmp_path: Path) -> CellFiles:
    (tmp_path / "study.yaml").write_text(STUDY)
    (cell,) = cells_of(load_study(tmp_path / "study.yaml"))
    files = SweepDirectory(tmp_path / "out").files(cell)
    files.run.path.mkdir(parents=True)
    return files


@pytest.mark.parametrize("content", [*DAMAGED, "{}", '{"state": 1}', '{"state": "done", "state": "done"}'])
def test_a_damaged_result_is_named(files: CellFiles, content: str) -> None:
    files.result.write_text(content)
    with pytest.raises(ConfigError) as caught:
        files.is_done()
    assert str(files.result) in str(caught.value) and "remove the file" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_records_of_a_cell(files: CellFiles, content: str) -> None:
    """A cell whose record is damaged has failed, and says why; a damaged event log says nothing of its end."""
    files.run.metrics.write_text(content * 2)
    files.run.events.write_text(content * 2)
    assert (len(events_of(files.run)), ending_of(files.run), files.last_step()) == (0, {}, 0)
    result = result_of(files, "done", {}, None, None)
    assert result["state"] == "failed" and str(files.run.metrics) in result["error"]
    files.run.config.write_text(content)
    assert str(files.run.config) in str(changes_of(files)[0])


@pytest.mark.parametrize("key", RECORD)
def test_any_value_of_a_record_may_be_missing_or_wrong(files: CellFiles, key: str) -> None:
    for bad in BAD:
        lines = [json.dumps(record) for record in (RECORD, {**RECORD, key: bad}, RECORD)]
        files.run.metrics.write_text("\n".join([*lines, ""]))
        result = result_of(files, "done", {}, None, None)
        assert result["state"] == "done" or str(files.run.metrics) in result["error"], (key, bad)
        json.dumps(result, allow_nan=False)
    files.run.metrics.write_text(json.dumps({name: value for name, value in RECORD.items() if name != key}) + "\n")
    result = result_of(files, "done", {}, None, None)
    assert result["state"] == "done" or str(files.run.metrics) in result["error"], key


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_notes_of_a_study(tmp_path: Path, content: str) -> None:
    about = tmp_path / "study.json"
    about.write_text(content)
    note_end(about)
    assert about.read_text() == content
    with pytest.raises(ConfigError, match=r"study\.json"):
        note_start(about, "s", [])


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", ["results.jsonl", "study.json", "sweep.yaml"])
def test_a_damaged_sweep_is_reported_with_notes(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content * 2)
    sweep = open_sweep(tmp_path)
    assert sweep.cells.empty and any(name in note for note in sweep.notes)
    with pytest.raises(PredictionError) as caught:
        predict(tmp_path, tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_run_is_reported_with_notes(tmp_path: Path, content: str) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "rolled_back.jsonl", "config.yaml", "job.json"):
        (tmp_path / name).write_text(content * 2)
    run = open_run(tmp_path)
    assert run.last_step == 0 and run.state and any("config.yaml" in note for note in run.notes)
    row = read_run(tmp_path, 0.0)
    assert any("job.json" in note for note in row.unreadable)
    with pytest.raises(ValueError, match=r"job\.json is no job file of this program"):
        JobFile.read(tmp_path / "job.json")


@pytest.mark.parametrize("reader", [lambda path: read_record(path, "step"), lambda path: cut_record(path, 1)])
@pytest.mark.parametrize("content", DAMAGED[1:])
def test_a_damaged_record_is_named_with_its_line(
    tmp_path: Path, content: str, reader: Callable[[Path], object]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + content + '{"step": 2}\n')
    with pytest.raises(ValueError) as caught:
        reader(path)
    assert str(caught.value).startswith(f"{path}, line 2") and str(caught.value).isprintable()


def test_a_job_file_of_version_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    file = JobFile(path, job_id="7")
    file.write()
    values = json.loads(path.read_text())
    assert values.pop("version") == 2
    path.write_text(json.dumps(values))
    assert JobFile.read(path).job_id == "7"
    path.write_text(json.dumps({**values, "version": 3}))
    with pytest.raises(ValueError, match="its version is 3, this program reads 1 to 2"):
        JobFile.read(path)


def test_what_the_events_recorded_is_shown(tmp_path: Path) -> None:
    """The cost of checkpoints and the summary of a finished run."""
    saves = [{"event": "checkpoint", "bytes": 2e6, "stall_seconds": 0.5, "write_seconds": 1.5} for _ in range(3)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in saves))
    shown = checkpoints_text(open_run(tmp_path))
    assert shown == "3, the last of 2.00 MB; training waited 1.50 s for them, and the last was written in 1.50 s"
    finished = {"event": "finished", "wall_seconds": 3.0, "peak_memory_gib": 0.5, "loss_first": 4.0}
    assert event_text(finished) == "wall_seconds 3.0, peak_memory_gib 0.5, loss_first 4.0"
