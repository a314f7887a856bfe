"""tools/report.py on folders with known effects, and its pages in a real browser."""

import json
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.browser import Browser, Loaded, chromium
from tests.support.study_folders import Record, cell_of, step_record, write_lines, write_run, write_sweep
from tests.support.tools import Ran, run_tool

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

EFFECTS = {"dense": 0.0, "mlra": -0.1, "control": 0.0}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported(write_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "sweep"
    write_sweep(folder, EFFECTS, rates=(1e-3, 3e-3, 1e-2), diverged=[("dense", 1e-2)], record_steps=4)
    return reported(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("needs Chromium (Debian: chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def reported(folder: Path) -> Path:
    ran = run_tool("report", folder)
    assert ran.code == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == str(folder / "report" / "report.html")
    return folder


def page_of(folder: Path) -> str:
    """The page without its images."""
    return re.sub(r'src="data:[^"]*"', "", (folder / "report" / "report.html").read_text(encoding="utf-8"))


def plain(page: str) -> str:
    """What a reader sees, roughly: tags become single spaces."""
    for code, character in (("&#x27;", "'"), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        page = page.replace(code, character)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def row(page: str, *cells: str) -> str:
    """The row of a table that begins with these cells."""
    for found in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL):
        texts = [plain(cell).strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", found, re.DOTALL)]
        if texts[: len(cells)] == list(cells):
            return " | ".join(texts)
    raise AssertionError(f"no row {cells}")


def check_images(folder: Path) -> list[str]:
    """Every PNG is whole, has content, and stands in the page; returns their names."""
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    images = sorted((folder / "report").glob("*.png"))
    assert len(images) == page.count("<img ")
    for image in images:
        data = image.read_bytes()
        assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
        assert min(struct.unpack(">II", data[16:24])) > 200
    return [image.name for image in images]


def test_the_report_of_a_run(run_folder: Path) -> None:
    assert check_images(run_folder) == ["blocks.png", "overview.png", "run.png"]
    page = page_of(run_folder)
    text = plain(page)
    assert "finished; 300 of 300 steps recorded." in text
    assert row(page, "layout") == "layout | 4 processes: data 4, tensor 1, pipeline 1, ZeRO stage 0"
    assert row(page, "commit") == "commit | not recorded"
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    first, last = f"{records[0]['loss']:.2f}", f"{records[-1]['loss']:.3f}"
    assert row(page, "training loss").startswith(f"training loss | {first} | {last} | ")
    assert row(page, "validation loss").endswith("| nats per token | 7")
    assert row(page, "perplexity of held-out, per token") == (
        "perplexity of held-out, per token | 200.0 | 125.0 | 125.0 | 200.0 |  | 7"
    )
    assert row(page, "choose: acc") == "choose: acc | 0.2500 | 0.5500 | 0.2500 | 0.5500 |  | 7"
    assert "25 recorded step(s) were undone in 1 rollback(s)" in text
    assert "guard_skip: 1, guard_lower_rate: 1, guard_rollback: 1, finished: 1" in text
    assert "to_step 150" in row(page, "2025-01-01 00:00:00", "guard_rollback", "200")
    assert "Not drawn" not in text
    assert "num_layers: 12" in page


@pytest.mark.slow
def test_a_page_asks_for_nothing_and_runs_nothing(run_folder: Path, sweep_folder: Path) -> None:
    for folder in (run_folder, sweep_folder):
        page = page_of(folder)
        assert "default-src 'none'" in page
        for forbidden in ("<script", "http://", "https://", "<iframe", "@import", "javascript:"):
            assert forbidden not in page, forbidden


def test_the_same_folder_gives_the_same_report(run_folder: Path, tmp_path: Path) -> None:
    ran = run_tool("report", run_folder, "--output", tmp_path / "again")
    assert ran.code == 0
    for file in (run_folder / "report").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_a_sweep_states_the_true_difference_and_not_the_null(sweep_folder: Path) -> None:
    check_images(sweep_folder)
    page = page_of(sweep_folder)
    text = plain(page)
    assert "90 of 90 planned cells finished: 84 done, 6 diverged, 0 failed." in text
    # 3 pairs of variants x (6 settings and their mean) x 5 measures, and the sensitivity in 2 settings.
    assert "Number of comparisons made: 111" in text
    assert row(page, "final training loss", "mlra - dense").split(" | ")[2:] == ["5", "0", "0", "2"]
    assert row(page, "", "control - dense").split(" | ")[2:] == ["0", "0", "5", "2"]
    stated = r"mlra - dense, depth \(blocks\) 24, learning rate 0.001: final training loss: lower by 0\.10\d* \+- "
    assert re.search(stated, text)
    assert not re.search(r"control - dense, [^:]*: (final training|validation) loss: (lower|higher)", text)
    assert "no difference is supported" in text
    for word in ("winner", "best variant", "better than", "outperform"):
        assert word not in text


def test_a_sweep_counts_divergences_and_says_what_that_does_to_pairs(sweep_folder: Path) -> None:
    text = plain(page_of(sweep_folder))
    assert "dense: 6 of 30 runs diverged; mlra: 0 of 30 runs diverged; control: 0 of 30 runs diverged" in text
    assert "left out: 3 pairs (dense diverged)" in text
    assert "no claim is made with fewer than 3 pairs" in text


def test_a_sweep_shows_sensitivity_associations_and_costs(sweep_folder: Path) -> None:
    page = page_of(sweep_folder)
    text = plain(page)
    sensitivity = float(row(page, "depth (blocks) 24", "dense").split(" | ")[2].split(" +- ")[0])
    # Three of five seeds diverge at one of three rates: 3/5 x (10.8 - 6)/3 and a little more.
    assert 0.9 < sensitivity < 1.2
    found = row(page, "TEV mean and gradient variance (embedding)", "nothing", "84")
    assert found.endswith("positive: the interval excludes 0")
    assert "step and learning rate" in text and "their intervals are not adjusted for that number" in text
    assert "Not measured: no run has recorded it (measuring_seconds)." in text


def test_costs_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    """A step takes 0.5 s of which TEV is 0.01 s, and gradient statistics 0.02 s in every other."""
    write_lines(tmp_path / "results.jsonl", [cell_of("a", {}, 1)])
    cell = tmp_path / json.loads((tmp_path / "results.jsonl").read_text())["run"]
    cell.mkdir(parents=True)
    records = []
    for step in range(1, 11):
        seconds = {"tev": 0.01} | ({"gradients": 0.02} if step % 2 == 0 else {}) | {"activations": 0.1}
        within = seconds["tev"] + seconds.get("gradients", 0.0)
        counts = {"consumed_tokens": 100 * step, "tokens_per_second": 100 / (0.5 + within)}
        records.append({"step": step, "loss": 5.0, "measuring_seconds": seconds, **counts})
    write_lines(cell / "metrics.jsonl", [{"step": 0, "measuring_seconds": {"tev": 9.0}}, *records])
    page = page_of(reported(tmp_path))
    assert row(page, "TEV", "10") == "TEV | 10 | 0.0100 | 2.0 % | 2.00 %"
    assert row(page, "gradient statistics") == "gradient statistics | 5 | 0.0200 | 4.0 % | 2.00 %"
    assert row(page, "activation probe") == "activation probe | 10 | 0.100 | 20.0 % | 20.00 %"
    assert "TEV took 0.50 times what gradient statistics took." in plain(page)
    assert "took 0.500 s" in plain(page)


def test_too_few_seeds_make_no_claim(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": 0.0, "b": -5.0}, rates=(1e-3,), depths=(24,), seeds=(1, 2), record_steps=0)
    text = plain(page_of(reported(tmp_path / "s")))
    assert "No difference between variants is supported by these runs." in text
    assert "no claim is made with fewer than 3 pairs" in text
    assert not re.search(r"\b(lower|higher) by", text)


def odd_records() -> list[Record]:
    """Everything that a record should not hold, and may."""
    draw = np.random.default_rng(0)
    records = [step_record(step, draw) for step in range(6)]
    records[1] |= {"loss": None, "tev_mean": None, "gradient_norm": float("nan"), "activations": None, "gradients": 3}
    records[2] |= {"loss": "high", "tev_quantiles": {"0.05": None, "odd": 1, "0.3": 0.1}, "spike_scores": []}
    records[3]["gradients"] = {"kinds": {"all": None}, "layers": {"gradient_variance": [None, "x", float("inf")]}}
    records[4]["activations"]["attention_entropy"] = []
    for record, tasks in zip(records, (3, {"odd": None}, {"odd": {"token_perplexity": "high"}}, {}), strict=False):
        record["tasks"] = record["harness"] = tasks
    return [*records, {"step": "seven"}, {"step": None, "loss": 1.0}, {"no": "step"}]


ODD_RUNS: dict[str, dict[str, Any]] = {
    "nothing recorded": {"metrics.jsonl": "", "events.jsonl": ""},
    "one step": {"metrics.jsonl": [step_record(0, np.random.default_rng(0))]},
    "only a loss": {"metrics.jsonl": [{"step": step, "loss": 5.0} for step in range(3)]},
    "no number at all": {"metrics.jsonl": [{"step": step, "loss": None, "tev_mean": None} for step in range(3)]},
    "values that are none": {"metrics.jsonl": odd_records()},
    "a torn line": {"metrics.jsonl": '{"step": 1, "loss": 5.0}\n{"step": 2, "lo'},
    "broken lines": {"metrics.jsonl": '{"step": 1, "loss": 5.0}\nnonsense\n{"step": 3, "loss": 4.0}\n'},
    "a broken configuration": {"config.yaml": "model: [1, 2\n"},
    "odd values in the configuration": {"config.yaml": "model: 3\nparallel: {tensor: 0}\nguard: {enabled: [1]}\n"},
    "events alone": {
        "metrics.jsonl": "",
        "events.jsonl": [
            {"event": "start", "world_size": "many"},
            {"event": "guard_rollback"},
            {"event": "guard_lower_rate", "step": 3, "until": None},
            {"event": "stopped", "exit_code": [3]},
            {"time": 5},
        ],
    },
    "rolled back and nothing kept": {"metrics.jsonl": "", "rolled_back.jsonl": [{"step": 3, "loss": 9.0}]},
}


@pytest.mark.parametrize("name", ODD_RUNS)
def test_a_run_is_reported_however_little_there_is(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", steps=4, every=1)
    (folder / "rolled_back.jsonl").unlink()
    for file, content in ODD_RUNS[name].items():
        if isinstance(content, str):
            (folder / file).write_text(content)
        else:
            write_lines(folder / file, content)
    page = page_of(reported(folder))
    check_images(folder)
    text = plain(page)
    if name == "nothing recorded":
        assert "There is nothing to draw yet." in text and "No event was recorded." in text
    if name == "only a loss":
        assert "TEV: mean and spread over tokens: not measured (needs tev.every)." in text
        assert "Activations: attention logits: not measured (needs activations.every)." in text
    if name == "broken lines":
        assert "metrics.jsonl: 1 line(s) are no JSON objects and are left out" in text
    if name == "a torn line":
        assert "What could not be read" not in text and "1 of 4 steps recorded" in text
    if name == "no number at all":
        assert "training loss: 3 of 3 recorded values are not finite numbers" in text


def test_a_run_in_progress_has_no_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=8, every=1)
    events = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(events[:-1]))
    assert "in progress, or ended without an event; 8 of 8 steps" in plain(page_of(reported(folder)))


def test_the_commit_of_a_cell_is_that_of_its_sweep(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"commit": "0123abc"}')
    folder = write_run(tmp_path / "cells" / "a-seed1", steps=4, every=1)
    assert row(page_of(reported(folder)), "commit") == "commit | 0123abc (of the sweep)"


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: the second one with half the rate and half of its steps, the third one without a record."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / "first"), write_run(folder / "second", steps=150), write_run(folder / "third" / "x", 4)]
    config = (runs[1] / "config.yaml").read_text()
    (runs[1] / "config.yaml").write_text(config.replace("lr: 0.003", "lr: 0.0015"))
    records = [json.loads(line) | {"mfu": 0.345} for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    write_lines(runs[1] / "metrics.jsonl", records)
    (runs[2] / "metrics.jsonl").write_text("")
    return runs


def test_several_runs_side_by_side(three_runs: list[Path]) -> None:
    folder = three_runs[0].parent
    ran = run_tool("report", *three_runs)
    assert ran.code == 0 and ran.stdout.splitlines() == [
        str(folder / "report" / name) for name in ("report.html", "runs.png")
    ], ran.stderr
    assert check_images(folder) == ["runs.png"]
    page = page_of(folder)
    assert "<h1>Runs first, second, x</h1>" in page
    assert row(page, "steps") == "steps | 300 of 300 | 150 of 150 | 0 of 4 | "
    assert row(page, "optim.lr") == "optim.lr | 0.003 | 0.0015 | 0.003"
    assert row(page, "train.steps") == "train.steps | 300 | 150 | 4"
    assert row(page, "tokens per second, median") == "tokens per second, median | 4,096 | 4,096 | - | "
    assert row(page, "MFU, median") == "MFU, median | - | 34.5 | - | %"
    # 1024 tokens a step at 4096 tokens/s.
    assert row(page, "time of all steps") == "time of all steps | 75.0 | 37.5 | - | s"
    last = json.loads((three_runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert row(page, "training loss, last").startswith(f"training loss, last | {last['loss']:.4f} | ")
    assert "data.path" not in page, "what is the same in all runs is not listed"


def test_the_axis_is_tokens_where_batches_differ(three_runs: list[Path], tmp_path: Path) -> None:
    first, second = three_runs[:2]
    other = tmp_path / "other"
    shutil.copytree(second, other)
    (other / "config.yaml").write_text(
        (other / "config.yaml").read_text().replace("global_batch_size: 8", "global_batch_size: 16")
    )
    for runs, axis in (([first, second], "optimizer steps"), ([first, other], "tokens")):
        assert run_tool("report", *runs, "--output", tmp_path / axis).code == 0
        assert f"<h2>Over {axis}</h2>" in (tmp_path / axis / "report.html").read_text()


def test_a_validation_loss_is_compared_where_all_have_one(three_runs: list[Path], tmp_path: Path) -> None:
    ran = run_tool("report", *three_runs[:2], "--output", tmp_path / "report")
    assert ran.code == 0, ran.stderr
    (found,) = [line for line in plain(page_of(tmp_path)).split(" nats per token") if "at step 150, the last" in line]
    steps = {record["step"]: record for record in map(json.loads, (three_runs[0] / "metrics.jsonl").open())}
    assert f"{steps[150]['validation_loss']:.4f}" in found


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "run", steps=4, every=1)
    ran = run_tool("report", tmp_path / "a" / "run", tmp_path / "b" / "run", "--output", tmp_path / "report")
    assert ran.code == 0 and "<h1>Runs a/run, b/run</h1>" in page_of(tmp_path), ran.stderr


def test_the_terminal_shows_the_curves_of_a_run(run_folder: Path) -> None:
    shown = run_tool("report", run_folder).stdout.splitlines()
    first, last = shown.index("training loss"), shown.index("TEV mean")
    assert last == first + 14 and max(map(len, shown[first:])) <= 72
    assert shown[first + 1].strip()[0].isdigit() and shown[first + 12].split() == ["0", "300"]


def test_runs_and_sweeps_are_not_mixed(three_runs: list[Path], sweep_folder: Path) -> None:
    first = three_runs[0]
    for arguments, message in (
        ([first, sweep_folder], "which has a report of its own"),
        ([first, first.parent / "third" / ".." / "first"], "the same run is named twice"),
        ([sweep_folder, "--prompt", "x"], "--prompt is for runs"),
        ([first, first.parent], "neither a run directory nor a sweep's output folder"),
    ):
        ran = run_tool("report", *arguments)
        assert ran.code == 2 and message in ran.stderr


def test_a_run_without_a_checkpoint_has_the_reason_instead_of_a_sample(three_runs: list[Path], tmp_path: Path) -> None:
    ran = run_tool("report", *three_runs[:2], "--prompt", "def <b>", "--output", tmp_path / "report")
    assert ran.code == 0, ran.stderr
    page = page_of(tmp_path)
    assert "Prompt: def &lt;b&gt;" in page and "(no sample: " in row(page, "first")


ODD_SWEEPS: dict[str, dict[str, Any]] = {
    "no finished cell": {"results.jsonl": "", "sweep.yaml": '{"variants": {"a": {}, "b": {}}, "seeds": [1, 2]}'},
    "a plan alone": {"sweep.yaml": "variants: {a: {}}\n"},
    "one cell": {"results.jsonl": [cell_of("a", {"optim.lr": 1e-3}, 1)]},
    "a torn line": {"results.jsonl": json.dumps(cell_of("a", {}, 1)) + '\n{"cell": "b'},
    "every cell diverged": {
        "results.jsonl": [
            cell_of(v, {"optim.lr": r}, s, state="diverged", final_loss=None, initial_loss=None)
            for v in "ab"
            for r in (1e-3, 1e-2)
            for s in (1, 2, 3)
        ]
    },
    "every cell failed": {"results.jsonl": [cell_of("a", {}, s, state="failed", error="<b>no & never") for s in "12"]},
    "odd names and axes": {
        "results.jsonl": [
            cell_of(
                v, {"data.path": "<i>x</i>", "optim.betas": [0.9, b], "k": None}, s, final_loss=5.0 + b * len(str(s))
            )
            for v in (
                "_a$1$",
                "<script>alert(1)</script>",
                "a very long name that says everything there is to say",
            )
            for b in (0.9, 0.99)
            for s in (1, "two", None)
        ]
    },
    "odd lines": {"results.jsonl": [{"variant": "a", "state": "done"}, {"variant": 3, "state": "done"}, {"x": 1}]},
    "odd study": {"results.jsonl": "", "study.json": "[1]", "sweep.yaml": "variants: 3\nseeds: 4\naxes: [1]\n"},
}


@pytest.mark.parametrize("name", ODD_SWEEPS)
def test_a_sweep_is_reported_however_little_there_is(tmp_path: Path, name: str) -> None:
    for file, content in ODD_SWEEPS[name].items():
        if isinstance(content, str):
            (tmp_path / file).write_text(content)
        else:
            write_lines(tmp_path / file, content)
    page = page_of(reported(tmp_path))
    check_images(tmp_path)
    text = plain(page)
    if name == "no finished cell":
        assert "No cell is finished yet (0 of 4 planned): there is nothing to compare." in text
    if name == "every cell diverged":
        assert "a: 6 of 6 runs diverged; b: 6 of 6 runs diverged" in text
    if name == "every cell failed":
        assert "<b>no" not in page and "no & never" in text
    if name == "odd names and axes":
        assert "<script" not in page and "<i>x" not in page


def test_what_is_no_run_and_no_sweep_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert run_tool("report", path) == Ran(
            2, "", f"report: error: {path}: neither a run directory nor a sweep's output folder\n"
        )


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "results.jsonl", [])
    (tmp_path / "file").write_text("")
    ran = run_tool("report", tmp_path, "--output", tmp_path / "file")
    assert ran.code == 2 and ran.stderr.startswith(f"report: error: {tmp_path / 'file'} cannot be written (")


def test_without_a_library_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "results.jsonl", [])
    for name in [name for name in sys.modules if name.startswith("mlra_scale.study.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run_tool("report", tmp_path)
    assert ran.code == 2 and ran.stdout == ""
    assert re.fullmatch(r"report: error: reports need .*matplotlib.*pip install 'mlra-scale\[report\]'\n", ran.stderr)


def check_loaded(loaded: Loaded) -> None:
    assert loaded.complaints == []
    assert loaded.requests == []
    assert loaded.overflowing == []
    assert loaded.images
    for image in loaded.images:
        assert image["complete"] and image["width"] > 200 and image["height"] > 200, image
        assert image["alt"]
    assert loaded.screenshot.startswith(b"\x89PNG") and len(loaded.screenshot) > 20_000


@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_report_of_a_run(browser: Browser, run_folder: Path, width: int) -> None:
    loaded = browser.load(run_folder / "report" / "report.html", width)
    check_loaded(loaded)
    assert loaded.title == "Run run"
    assert "finished; 300 of 300 steps recorded." in loaded.text
    assert [(image["width"], round(image["shown"])) for image in loaded.images] == [(1170, min(width - 32, 960))] * 3


@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_report_of_a_sweep(browser: Browser, sweep_folder: Path, width: int) -> None:
    loaded = browser.load(sweep_folder / "report" / "report.html", width)
    check_loaded(loaded)
    assert "What these runs support" in loaded.text


def test_a_browser_shows_odd_names_as_text(browser: Browser, tmp_path: Path) -> None:
    write_lines(tmp_path / "results.jsonl", ODD_SWEEPS["odd names and axes"]["results.jsonl"])
    loaded = browser.load(reported(tmp_path) / "report" / "report.html")
    check_loaded(loaded)
    assert "<script>alert(1)</script>" in loaded.text


def test_the_browser_notices_what_it_is_asked_to_notice(browser: Browser, tmp_path: Path) -> None:
    """The checks above pass on good pages; this one shows that they would fail on others."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<title>bad</title><p style='width: 3000px'>wide</p><img src='gone.png' alt=''>"
        "<script>console.error('heard'); throw new Error('thrown')</script>"
    )
    loaded = browser.load(page)
    assert any("heard" in text for text in loaded.complaints) and any("thrown" in text for text in loaded.complaints)
    assert [Path(url).name for url in loaded.requests] == ["gone.png"]
    assert any(text.startswith("P ") for text in loaded.overflowing)
    assert loaded.images[0]["width"] == 0
