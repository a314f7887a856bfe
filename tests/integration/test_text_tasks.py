"""evaluation.tasks in real runs: the figures are those of other programs on the checkpoint, in every layout."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlra_scale.checkpoint.retention import checkpoint_at
from mlra_scale.config import batch_plan, load_config
from tests.support.gpt2_folders import TEXT
from tests.support.harness_tasks import harness_files
from tests.support.pool import Pools
from tests.support.tools import run_tool
from tests.support.training_runs import Start, curve, metrics

SHORT = ["train.steps=4", "checkpoint.every=2", "tev.every=0", "optim.lr=5e-3"]
LAYOUTS = {
    "one": (1, ()),
    "data-2": (2, ("train.micro_batch_size=2",)),
    "pipeline-2": (2, ("parallel.pipeline=2",)),
    "tensor-2": (2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "zero-3": (2, ("deepspeed.zero_optimization.stage=3",)),
    "pipeline-2-data-2": (4, ("parallel.pipeline=2", "data.document_attention=masked")),
    "tensor-2-zero-3": (4, ("parallel.tensor=2", "deepspeed.zero_optimization.stage=3")),
}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """A long document, and short ones of which the last micro-batches are not full."""
    (tmp_path / "story.txt").write_text(TEXT * 3)
    lines = [*TEXT.splitlines(), *TEXT.replace(",", ";").split(".")]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {"story": tmp_path / "story.txt", "lines": tmp_path / "lines.jsonl"}


def evaluated(run: Path, text: Path) -> dict[str, Any]:
    result = run_tool("evaluate", run, "--text", text, "--json")
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow_except("pipeline-2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_figures_are_those_of_the_checkpoint(
    tmp_path: Path, texts: dict[str, Path], start: Start, training_data: Path, layout: str
) -> None:
    number, overrides = LAYOUTS[layout]
    options = [f"evaluation.tasks=[{','.join(map(str, texts.values()))}]", f"data.path={training_data}", *overrides]
    finished = start("run", *SHORT, *options, num_processes=number)
    found = curve(tmp_path / "run", "tasks")
    assert list(found) == [2, 4], "at every checkpoint"
    for name, text in texts.items():
        expected = evaluated(tmp_path / "run", text)
        for figure, value in found[4][name].items():  # type: ignore[index]
            assert value == pytest.approx(expected[figure], rel=1e-5), (name, figure)
        assert found[4][name] != found[2][name]  # type: ignore[index]
        perplexity = found[4][name]["token_perplexity"]  # type: ignore[index]
        assert f"{name} {perplexity:,.1f} per token" in finished.stdout
    state = json.loads((checkpoint_at(tmp_path / "run") / "state.json").read_text())
    assert state["tasks"] == found[4]
    costs = [record["measuring_seconds"]["tasks"] for record in metrics(tmp_path / "run") if "tasks" in record]
    assert len(costs) == 2 and min(costs) > 0.0


def by_the_harness(folder: Path, files: list[str]) -> dict[str, dict[str, float]]:
    """What lm-evaluation-harness finds by itself on an exported folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    results = simple_evaluate(model=model, tasks=files, bootstrap_iters=0, log_samples=False)
    assert results is not None
    return {
        name: {key.removesuffix(",none"): value for key, value in values.items() if key.endswith(",none")}
        for name, values in results["results"].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tensor-2", "pipeline-2-data-2", "zero-3"])
def test_the_harness_finds_the_same_on_the_export(
    tmp_path: Path, start: Start, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra harness)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    number, overrides = LAYOUTS[layout]
    overrides = tuple(each for each in overrides if not each.startswith("data."))  # an export attends to all
    files = [str(file) for file in harness_files(tmp_path).values()]
    tasks = ",".join(f"harness:{file}" for file in files)
    finished = start(
        "run", *SHORT, f"evaluation.tasks=[{tasks}]", "export.format=gpt2", *overrides, num_processes=number
    )
    found = curve(tmp_path / "run", "harness")
    assert list(found) == [2, 4]
    expected = by_the_harness(tmp_path / "run" / "exported", files)
    assert found[4].keys() == expected.keys() == {"choose", "last_word", "whole", "few_shot"}  # type: ignore[attr-defined]
    for name, metrics_of in found[4].items():  # type: ignore[attr-defined]
        assert {key: value for key, value in expected[name].items() if "stderr" not in key} == (
            pytest.approx(metrics_of, rel=1e-5)
        )
    assert f"choose acc {found[4]['choose']['acc']:.4g}, acc_norm" in finished.stdout  # type: ignore[index]
    card = (tmp_path / "run" / "exported" / "README.md").read_text()
    assert f"| choose | acc | {found[4]['choose']['acc']:.4g} |" in card  # type: ignore[index]


@pytest.mark.slow
def test_they_change_nothing_in_the_training(tmp_path: Path, texts: dict[str, Path], start: Start) -> None:
    dropout = "model.residual_dropout=0.1"
    start("without", *SHORT, dropout)
    start("with", *SHORT, dropout, f"evaluation.tasks=[{texts['story']}]", "evaluation.task_tokens=100")
    assert curve(tmp_path / "with", "loss") == curve(tmp_path / "without", "loss")
    assert curve(tmp_path / "with", "tasks")[4]["story"]["tokens_scored"] == 99  # type: ignore[index]


def test_a_text_that_cannot_be_read_ends_the_start(tmp_path: Path, texts: dict[str, Path], start: Start) -> None:
    missing = start("missing", *SHORT, f"evaluation.tasks=[{tmp_path}/none.txt]", code=2)
    assert "evaluation.tasks" in missing.stderr and "none.txt" in missing.stderr
    (tmp_path / "empty.txt").write_text("")
    empty = start("empty", *SHORT, f"evaluation.tasks=[{tmp_path}/empty.txt]", code=2)
    assert "empty.txt: there is nothing to score" in empty.stderr
    (tmp_path / "short.txt").write_text("a")
    short = start("short", *SHORT, f"evaluation.tasks=[{tmp_path}/short.txt]", num_processes=2, code=2)
    assert "evaluation.tasks: short: there is nothing to score" in short.stderr
    assert not (tmp_path / "empty" / "metrics.jsonl").exists()


def slow_harness(rank: int, world_size: int) -> tuple[dict[str, Any], int]:
    """Evaluates on two ranks with a harness that needs its time between passes; counts this rank's signs of life."""
    import torch
    import torch.distributed as dist

    from mlra_scale.evaluation.harness import Score
    from mlra_scale.evaluation.perplexity import Window
    from mlra_scale.evaluation.tasks import Tasks
    from mlra_scale.training.watch.text_tasks import TextTasks

    class Scoring(TextTasks):
        def score(self, windows: Any) -> list[Score]:
            found = torch.tensor([float(len(window.tokens)) for window in windows])
            dist.all_reduce(found)
            time.sleep(0.1)
            return [Score(value, True) for value in found.tolist()]

    def evaluate(score: Any) -> dict[str, dict[str, float]]:
        found = list[float]()
        for length in (2, 3, 4):
            time.sleep(0.2)
            found += [each.negative_log_likelihood for each in score([Window([0] * length, 1)])]
        time.sleep(0.2)
        return {"slow": {"sum": sum(found)}}

    harness: Any = SimpleNamespace(evaluate=evaluate) if rank == 0 else None
    engine: Any = SimpleNamespace(topology=SimpleNamespace(rank=rank, control_group=dist.group.WORLD))
    signs, plan = list[int](), batch_plan(load_config("debug"), world_size)
    tasks = Scoring(engine, plan, Tasks([], harness), lambda: signs.append(1), lambda: None, print, 0.02)
    return tasks.measure(has_harness=True), len(signs)


def test_ranks_hear_that_a_slow_harness_is_at_work(worker_pool: Pools) -> None:
    for found, num_signs in worker_pool(2).run(slow_harness):
        assert found == {"harness": {"slow": {"sum": 2.0 * (2 + 3 + 4)}}}
        assert num_signs >= 5
