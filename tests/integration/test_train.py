"""Training through the real command line and the real engines: what a run leaves behind, and how it can end."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from mlra_scale.config import Config
from mlra_scale.training.exit_codes import ExitCode
from tests.support.processes import train
from tests.support.training_runs import Start, base_command, curve, events, metrics, write_megatron_data
from tests.support.wandb_reader import history


def test_what_a_run_leaves_behind(tmp_path: Path, training_data: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train.steps=12", "train.log_every=4", "tev.every=3", "evaluation.every=6", "checkpoint.every=4"]
    arguments += ["wandb.mode=offline", "profile.start=5", "profile.stop=7"]
    arguments += ["gradients.every=6", "gradients.noise_every=12", "activations.every=6"]
    result = train(*base_command(run, training_data, *arguments))
    assert result.code == ExitCode.DONE, result.stderr
    # The profiler's tracing library announces itself and has no switch for it.
    noise = [line for line in result.stderr.splitlines() if not line.startswith("USDT:")]
    assert noise == [], "no banners, no warnings"

    assert list(curve(run, "loss")) == [1, 4, 8, 12]
    assert list(curve(run, "validation_loss")) == [0, 6, 12]
    assert list(curve(run, "tev_mean")) == [0, 3, 6, 9, 12]
    losses, validation = curve(run, "loss"), curve(run, "validation_loss")
    assert losses[1] == pytest.approx(math.log(512), abs=0.5)
    assert losses[12] < losses[1] and validation[12] < validation[0]
    costs = {item["step"]: item["measuring_seconds"] for item in metrics(run) if "measuring_seconds" in item}
    assert {step: set(seconds) for step, seconds in costs.items()} == {
        0: {"tev", "activations"},
        3: {"tev"},
        6: {"tev", "gradients", "activations"},
        9: {"tev"},
        12: {"tev", "noise", "activations"},
    }
    assert all(value > 0 for seconds in costs.values() for value in seconds.values())
    last = metrics(run)[-1]
    assert (last["consumed_samples"], last["consumed_tokens"]) == (12 * 8, 12 * 8 * 64)

    stored = Config.from_yaml((run / "config.yaml").read_text())
    assert stored.train.steps == 12 and stored.preset == "debug"
    assert [event["event"] for event in events(run)] == ["start", "checkpoint", "checkpoint", "checkpoint", "finished"]
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000008", "step-00000012"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000012\ncrc32:d94d3452\n"
    assert (run / "checkpoints" / "step-00000012" / "config.yaml").read_text() == stored.to_yaml()

    logged = {row["_step"]: row for row in history(run)}
    assert {step: row["loss"] for step, row in logged.items() if "loss" in row} == losses
    assert {step: row["validation_loss"] for step, row in logged.items() if "validation_loss" in row} == validation
    assert logged[3]["tev_mean"] == curve(run, "tev_mean")[3]

    (trace,) = (run / "profile").iterdir()
    assert trace.name == "steps-5-6.json" and json.loads(trace.read_text())["traceEvents"]

    for part in ("236,928", "step  8/12 | loss", "tok/s", "TEV", "validation loss", "done: step 12/12", "wandb sync"):
        assert part in result.stdout, part
    summary = result.stdout[result.stdout.index("done:") :]
    assert f"{losses[1]:.4f} -> {losses[12]:.4f} (perplexity {math.exp(losses[12]):,.1f})" in summary
    assert "metrics.jsonl" in summary and "--resume auto" in summary


@pytest.mark.slow
def test_two_ranks_train_like_one(start: Start, tmp_path: Path, training_data: Path) -> None:
    arguments = ["train.steps=4", "evaluation.every=4"]
    start("one", *arguments)
    start("pipeline", *arguments, "parallel.pipeline=2", num_processes=2)
    start("zero", *arguments, 'deepspeed.zero_optimization={"stage": 2}', num_processes=2)
    command = base_command(tmp_path / "tensor", training_data, *arguments, "parallel.tensor=2")
    result = train(*command, num_processes=2)
    assert result.code == 0, result.stderr[-4000:]
    assert result.stdout.count("step 3/4 |") == 1, "one rank prints"
    assert "Warning" not in result.stderr
    tolerances = {"loss": 1e-6, "gradient_norm": 1e-5, "validation_loss": 1e-6, "tev_mean": 1e-6}
    for run in ("pipeline", "zero", "tensor"):
        for name, tolerance in tolerances.items():
            expected = pytest.approx(curve(tmp_path / "one", name), rel=tolerance)
            assert curve(tmp_path / run, name) == expected, (run, name)


def test_megatrons_own_data_train_as_they_are_and_few_validation_data_are_reported(
    start: Start, tmp_path: Path
) -> None:
    prefix = write_megatron_data(tmp_path / "counting", num_documents=200)
    files = [Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx")]
    before = [path.read_bytes() for path in files]
    start("run", f"data.path={prefix}", "data.validation_fraction=0.1", "train.steps=12", "optim.warmup_steps=0")
    losses = curve(tmp_path / "run", "loss")
    assert losses[12] < losses[1] - 0.3
    assert [path.read_bytes() for path in files] == before
    few = write_megatron_data(tmp_path / "few")
    result = start("few", f"data.path={few}", "train.steps=1")
    assert re.search(r"validation data are [1-7] sample\(s\), less than a global batch of 8", result.stdout)


def write_foreign_tokens(prefix: Path) -> Path:
    """Writes tokens that the debug preset does not have where the check before the start does not look."""
    write_megatron_data(prefix, num_documents=2000)
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    # The check before the start reads 64 stretches of 4096 tokens; what lies between them escapes it.
    starts = np.linspace(0, len(tokens) - 4096, 64).astype(int)
    for this, following in itertools.pairwise(starts[:4]):
        assert this + 4096 < following, "the check reads the whole file: more documents are needed"
        tokens[this + 4096 : following] = 600
    tokens.tofile(f"{prefix}.bin")
    return prefix


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_foreign_token_found_while_training_stops_all_ranks(start: Start, tmp_path: Path, num_processes: int) -> None:
    prefix = write_foreign_tokens(tmp_path / "foreign")
    arguments = [f"data.path={prefix}", "train.steps=2000", "tev.every=0"]
    result = start("run", *arguments, num_processes=num_processes, code=ExitCode.BAD_INPUT)
    assert result.stderr.count("outside the model's vocabulary") == 1 and "Traceback" not in result.stderr
    stopped = events(tmp_path / "run")[-1]
    assert stopped["event"] == "stopped" and stopped["exit_code"] == ExitCode.BAD_INPUT
    assert stopped["consumed_samples"] == 8 * (stopped["step"] - 1)
    # The steps before are saved, on all ranks alike.
    assert stopped["step"] > 1
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().split()[0] == f"step-{stopped['step'] - 1:08d}"


@pytest.mark.slow
def test_bad_data_found_in_an_evaluation_cost_no_step(start: Start, tmp_path: Path) -> None:
    data, bad = write_megatron_data(tmp_path / "counting"), write_foreign_tokens(tmp_path / "foreign")
    arguments = [f"data.path={data}", f"data.validation_path={bad}", "train.steps=2", "activations.every=2"]
    arguments += ["evaluation.every=0", "evaluation.batches=400", "checkpoint.every=0"]
    result = start("run", *arguments, num_processes=2, code=ExitCode.BAD_INPUT)
    assert result.stderr.count("outside the model's vocabulary") == 1
    assert events(tmp_path / "run")[-1]["exit_code"] == ExitCode.BAD_INPUT
    assert list(curve(tmp_path / "run", "loss")) == [1, 2] and not curve(tmp_path / "run", "validation_loss")
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["left_out"] == ["validation", "activations"], "measured first by the next start"


# Decoupled weight decay multiplies the weights by 1 - lr * decay = -98 every step: fp32 overflows soon.
WILD = ["optim.lr=10", "optim.weight_decay=9.9", "optim.warmup_steps=0", "optim.schedule=constant"]
WILD += ["checkpoint.every=0", "train.steps=40"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks_on_one_step(
    start: Start, tmp_path: Path, num_processes: int, precision: str
) -> None:
    run = tmp_path / "run"
    result = start("run", *WILD, f"train.precision={precision}", num_processes=num_processes, code=ExitCode.NON_FINITE)
    stopped = events(run)[-1]
    assert stopped["event"] == "stopped" and stopped["exit_code"] == ExitCode.NON_FINITE
    step = stopped["step"]
    assert list(curve(run, "loss")) == list(range(1, step)), "flushed up to the step before"
    assert stopped["consumed_samples"] == 8 * (step - 1)
    assert result.stderr.count("is not finite") == 1
    for part in (f"step {step}", "loss", "gradient norm", "optim.lr", "--resume auto"):
        assert part in result.stderr
    assert not (run / "checkpoints").exists()


def test_under_a_launcher_each_rank_ends_with_the_code_of_the_reason(tmp_path: Path, training_data: Path) -> None:
    result = train(*base_command(tmp_path / "run", training_data, *WILD), num_processes=2)
    assert result.stderr.count("is not finite") == 1
    codes = [line.split(":")[1].split()[0] for line in result.stderr.splitlines() if "exitcode  :" in line]
    assert codes == ["3", "3"], result.stderr
