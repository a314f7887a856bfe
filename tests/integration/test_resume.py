"""Stopped and continued: as if nothing had happened on the same layout, to rounding on another, and what may change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlra_scale.checkpoint import Store, write_weights
from mlra_scale.training.exit_codes import ExitCode
from tests.support.pool import WorkerPool
from tests.support.stored import assert_bitwise_equal, store_of
from tests.support.tools import run_tool
from tests.support.training_runs import Finished, Start, curve, events, main_on_rank, metrics, write_megatron_data

DROPOUT = [f"model.{site}_dropout=0.1" for site in ("embedding", "attention", "residual")]
SMALL = ["model.num_layers=2", "model.hidden_size=32", "train.sequence_length=32", "evaluation.every=0"]
LAYOUTS = {
    "pipeline-tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "zero1-dp2": (2, ['deepspeed={"zero_optimization": {"stage": 1}}']),
    "zero3-tp2dp2": (4, ["parallel.tensor=2", 'deepspeed={"zero_optimization": {"stage": 3}}']),
}
ZERO3 = ['deepspeed={"zero_optimization": {"stage": 3}}']


@pytest.mark.slow_except("zero1-dp2-bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_equal_five_and_five_bitwise(start: Start, tmp_path: Path, layout: str, precision: str) -> None:
    """Losses, gradient norms, weights, both moments, counters: with dropout, whose masks nothing stores."""
    num_processes, degrees = LAYOUTS[layout]
    fixed = ["optim.schedule=constant", f"train.precision={precision}", *DROPOUT, *SMALL, *degrees]
    start("whole", "train.steps=10", "checkpoint.every=3", *fixed, num_processes=num_processes)
    start("parts", "train.steps=5", *fixed, num_processes=num_processes)
    result = start("parts", "train.steps=10", *fixed, "--resume", "auto", num_processes=num_processes)
    assert "resumed from" in result.stdout and "train.steps: 5 -> 10" in result.stdout
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for name in ("loss", "gradient_norm", "learning_rate", "consumed_samples"):
        assert curve(parts, name) == curve(whole, name), name
    assert list(curve(parts, "loss")) == list(range(1, 11)), "every step once"
    assert curve(parts, "validation_loss")[10] == curve(whole, "validation_loss")[10]
    assert_bitwise_equal(store_of(whole, 10), store_of(parts, 10))


@pytest.mark.slow
def test_model_options_are_resumed_bitwise_and_never_change(start: Start, tmp_path: Path) -> None:
    """Validations and an extra pass for the noise scale stand between the steps of the power iterations."""
    options = [f"model.{name}=true" for name in ("qk_norm", "sigma_reparam", "layer_norm_scaling")]
    options += ["model.embedding_scale=sqrt_width", "gradients.every=2", "gradients.noise_every=2"]
    degrees = ["parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch_size=1"]
    fixed = ["optim.schedule=constant", *options, *SMALL, "evaluation.every=1", *degrees]
    start("whole", "train.steps=6", *fixed, num_processes=4)
    start("parts", "train.steps=3", *fixed, num_processes=4)
    start("parts", "train.steps=6", *fixed, "--resume", "auto", num_processes=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for name in ("loss", "gradient_norm", "validation_loss"):
        assert curve(parts, name) == curve(whole, name), name
    stores = [store_of(folder, 6) for folder in (whole, parts)]
    assert_bitwise_equal(*stores)
    assert len(stores[0].buffer_names) == 12
    refused = ["train.steps=8", *fixed, "model.qk_norm=false", "--resume", "auto"]
    result = start("parts", *refused, num_processes=4, code=ExitCode.BAD_INPUT)
    assert "model.qk_norm = False: the run to be resumed has true" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pipeline-tp2pp2", "zero3-tp2dp2"])
def test_qk_clip_is_resumed_bitwise_and_is_in_the_weights_of_an_export(
    start: Start, tmp_path: Path, layout: str
) -> None:
    """With a threshold so low that it acts at every second step, which is when it may."""
    num_processes, degrees = LAYOUTS[layout]
    clip = ["qk_clip.threshold=0.01", "qk_clip.every=2", "qk_clip.samples=3"]
    fixed = ["optim.schedule=constant", "optim.lr=5e-3", "train.micro_batch_size=2", *clip, *DROPOUT, *SMALL, *degrees]
    start("whole", "train.steps=10", *fixed, num_processes=num_processes)
    start("parts", "train.steps=5", *fixed, num_processes=num_processes)
    start("parts", "train.steps=10", *fixed, "--resume", "auto", num_processes=num_processes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    clips = {record["step"]: record["qk_clip"] for record in metrics(whole) if "qk_clip" in record}
    assert list(clips) == [2, 4, 6, 8, 10] and all(value["clipped_heads"] > 0 for value in clips.values()), clips
    for name in ("loss", "gradient_norm", "qk_clip"):
        assert curve(parts, name) == curve(whole, name), name
    assert_bitwise_equal(store_of(whole, 10), store_of(parts, 10))
    text = tmp_path / "text.txt"
    text.write_text("Every head of this model was clipped. " * 20)
    result = run_tool("export_hf", parts, tmp_path / "out", "--format", "gpt2", "--text", text)
    assert result.code == 0, result.stderr


@pytest.mark.slow
def test_a_run_continues_in_any_other_layout(start: Start, tmp_path: Path) -> None:
    """From a pipeline to ZeRO 3, to one rank, to another batch per rank; in between, nothing has to be converted."""
    fixed = ["optim.schedule=constant", *DROPOUT, *SMALL]
    start("whole", "train.steps=8", *fixed)
    steps = iter((2, 4, 6, 8))
    start("run", f"train.steps={next(steps)}", *fixed, *LAYOUTS["pipeline-tp2pp2"][1], num_processes=4)
    start("run", f"train.steps={next(steps)}", *fixed, *ZERO3, "--resume", "auto", num_processes=2)
    start("run", f"train.steps={next(steps)}", *fixed, "train.micro_batch_size=8", "--resume", "auto")
    start("run", f"train.steps={next(steps)}", *fixed, "parallel.pipeline=2", "--resume", "auto", num_processes=2)
    for name, tolerance in (("loss", 1e-6), ("gradient_norm", 1e-5)):
        assert curve(tmp_path / "run", name) == pytest.approx(curve(tmp_path / "whole", name), rel=tolerance), name
    changed = [event for event in events(tmp_path / "run") if event["event"] == "changed"]
    ranks = [(event["was"], event["now"]) for event in changed if event["field"] == "number of ranks"]
    assert ranks == [(4, 2), (2, 1), (1, 2)]
    assert {"parallel.tensor", "deepspeed", "train.micro_batch_size"} <= {event["field"] for event in changed}


@pytest.mark.slow
def test_precision_and_global_batch_may_change_and_the_data_are_read_on(start: Start, tmp_path: Path) -> None:
    fixed = ["optim.schedule=constant", *SMALL]
    start("whole", "train.steps=6", *fixed)
    start("run", "train.steps=3", *fixed)
    start("run", "train.steps=6", "train.precision=bf16", *fixed, "--resume", "auto")
    losses, expected = curve(tmp_path / "run", "loss"), curve(tmp_path / "whole", "loss")
    assert losses == pytest.approx(expected, rel=2e-3) and losses[6] != expected[6]
    start("run", "train.steps=8", "train.global_batch_size=16", *fixed, "--resume", "auto")
    samples = [record["consumed_samples"] for record in metrics(tmp_path / "run") if record["step"] > 3]
    assert samples == [32, 40, 48, 64, 80]


@pytest.mark.slow
def test_going_back_cuts_the_record_also_to_the_first_checkpoint_of_a_guarded_run(start: Start, tmp_path: Path) -> None:
    fixed = ["train.steps=8", "guard.enabled=true", "checkpoint.every=3", "checkpoint.keep_last=9", *SMALL]
    start("run", *fixed)
    run = tmp_path / "run"
    losses, first = curve(run, "loss"), metrics(run)[0]
    assert list(losses) == list(range(1, 9)) and first["step"] == 0 and "tev_mean" in first
    for step, num_cut in ((3, 5), (0, 8)):
        start("run", *fixed, "--resume", str(run / "checkpoints" / f"step-{step:08d}"))
        assert curve(run, "loss") == losses, "the same steps once more, each recorded once"
        assert [record["step"] for record in metrics(run)] == list(range(9)) and metrics(run)[0] == first
        resumed = [event for event in events(run) if event["event"] == "resume"][-1]
        assert (resumed["step"], resumed["records_cut"]) == (step, num_cut)


@pytest.mark.slow
def test_the_run_directory_alone_is_enough_to_resume(
    start: Start, tmp_path: Path, worker_pool: Callable[[int], WorkerPool]
) -> None:
    """No preset, no file: X's config.yaml, its layout included. Overrides go by the rules of every resume."""
    fixed = ["optim.schedule=constant", "optim.lr=2e-3", "checkpoint.every=2", *SMALL, *ZERO3]
    start("run", "train.steps=4", *fixed, num_processes=2)
    run = tmp_path / "run"
    alone = ["--run-dir", str(run), "--resume", "auto"]

    def again(*overrides: str, code: int = 0) -> Finished:
        result: Finished
        (result,) = worker_pool(1).run(main_on_rank, (*alone, *overrides))
        assert result.code == code, result.stderr[-4000:]
        return result

    record, before = metrics(run), (run / "config.yaml").read_text()
    for overrides in ([], ["train.steps=4"], ["train.steps=1"]):  # resuming a finished run is no error
        assert f"already at step 4 ({run / 'checkpoints' / 'step-00000004'})" in again(*overrides).stdout
        assert metrics(run) == record and (run / "config.yaml").read_text() == before
        assert events(run)[-1]["event"] == "finished" and events(run)[-1]["steps"] == 4
    result = again("train.steps=5", "optim.lr=1e-3")
    for text in ("resumed from", "train.steps: 4 -> 5", "optim.lr: 0.002 -> 0.001", "number of ranks: 2 -> 1"):
        assert text in result.stdout, text
    assert "deepspeed" not in result.stdout.partition("changed from here on")[2], "the layout is that of the run"
    now = (run / "config.yaml").read_text()
    assert now == before.replace("steps: 4", "steps: 5").replace("lr: 0.002", "lr: 0.001")
    # The newest start counts, though its checkpoint is gone: what it was begun with stays.
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    result = again("train.steps=6")
    assert "step-00000005 is passed over" in result.stdout and "optim.lr: 0.002 -> 0.001" in result.stdout
    assert curve(run, "learning_rate")[6] == 1e-3
    assert "model.num_layers = 3: the run to be resumed has 2" in again("model.num_layers=3", code=2).stderr
    text, configuration = (run / "metrics.jsonl").read_text(), (run / "config.yaml").read_text()
    (run / "metrics.jsonl").write_text(text.replace('{"step": 2', '{"stop": 2'))
    assert "metrics.jsonl, line 3: no object with `step`" in again("train.steps=7", code=2).stderr
    assert (run / "config.yaml").read_text() == configuration, "nothing is written before all is checked"
    (run / "metrics.jsonl").write_text(text)
    (run / "config.yaml").write_text("model: [")
    stderr = again(code=2).stderr
    assert f"--run-dir = '{run / 'config.yaml'}': line 1" in stderr


@pytest.mark.slow
def test_a_branch_leaves_the_trunk_alone_and_keeps_what_it_was_begun_with_before_its_first_checkpoint(
    start: Start, tmp_path: Path, training_data: Path, worker_pool: Callable[[int], WorkerPool]
) -> None:
    """Killed that early, it begins again where it began; the next start need not name everything again."""
    other = write_megatron_data(tmp_path / "counting")
    begun = ["optim.lr=1e-4", f"data.blend={json.dumps({str(other): 1.0})}"]
    branch, fixed = tmp_path / "branch", ["train.steps=4", *SMALL]
    start("trunk", f"data.path={training_data}", "train.steps=2", *SMALL)
    files = sorted((tmp_path / "trunk").rglob("*"))
    start("branch", *begun, *fixed, "--resume", str(tmp_path / "trunk"))
    losses, state = curve(branch, "loss"), store_of(branch, 4).state["data"]
    assert list(losses) == [3, 4] and sorted((tmp_path / "trunk").rglob("*")) == files
    shutil.rmtree(branch / "checkpoints")
    bare = ["--preset", "debug", "--run-dir", str(branch), "train.log_every=1", *fixed, "--resume"]
    for resume in ("auto", str(tmp_path / "trunk")):
        (result,) = worker_pool(1).run(main_on_rank, (*bare, resume))
        assert result.code == ExitCode.DONE, result.stderr
        assert curve(branch, "loss") == losses and store_of(branch, 4).state["data"] == state
        shutil.rmtree(branch / "checkpoints")
    changed = [(event["field"], event["now"]) for event in events(branch) if event["event"] == "changed"]
    assert changed == 3 * changed[: len(changed) // 3] and {("optim.lr", 1e-4), ("train.steps", 4)} <= set(changed[:3])
    (refused,) = worker_pool(1).run(main_on_rank, (*bare, "auto", f"data.path={training_data}"))
    assert refused.code == ExitCode.BAD_INPUT and "data.blend" in refused.stderr


def test_everything_that_must_not_change_is_reported_at_once(start: Start, tmp_path: Path) -> None:
    start("run", "train.steps=2")
    other = write_megatron_data(tmp_path / "other")
    (tmp_path / "edited.yaml").write_text("optim: {lr: 1e-4}\n")
    arguments = ["train.steps=4", f"data.path={other}", "train.seed=9", "model.num_layers=5"]
    arguments += ["--config", str(tmp_path / "edited.yaml"), "--resume", "auto"]
    result = start("run", *arguments, code=ExitCode.BAD_INPUT)
    lines = [line.split(" = ")[0].strip() for line in result.stderr.splitlines()[1:]]
    assert sorted(lines) == ["data.path", "model.num_layers", "optim.lr", "train.seed"]
    assert "data.path = 'fingerprint" in result.stderr and "Traceback" not in result.stderr
    assert [event["event"] for event in events(tmp_path / "run")] == ["start", "checkpoint", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_takes_its_own_weight_decay(start: Start, tmp_path: Path, stage: int) -> None:
    """One step from the same checkpoint with another decay: the weights differ by -lr (new - old) w, and biases not."""
    fixed = ["optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=0.01"]
    fixed += [f'deepspeed.zero_optimization={{"stage": {stage}}}']
    start("trunk", "train.steps=2", "optim.weight_decay=0.1", *fixed)
    for name, decay in (("same", 0.1), ("more", 0.6)):
        arguments = [f"optim.weight_decay={decay}", "--resume", str(tmp_path / "trunk")]
        start(name, "train.steps=3", *fixed, *arguments)
    before, same, more = (store_of(tmp_path / name, step) for name, step in (("trunk", 2), ("same", 3), ("more", 3)))
    for name, info in before.table.items():
        weight = before.tensor(name)
        expected = torch.zeros_like(weight) if info.kind in ("bias", "norm") else -0.01 * (0.6 - 0.1) * weight
        torch.testing.assert_close(more.tensor(name) - same.tensor(name), expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
def test_another_mix_of_data_from_here_on(start: Start, tmp_path: Path, training_data: Path) -> None:
    """Named, it is taken from the next sample on and kept from then on; a run stopped within it continues bitwise."""
    other = write_megatron_data(tmp_path / "counting")
    blend = "data.blend=" + json.dumps({str(training_data): 0.5, str(other): 0.5})
    fixed = ["optim.schedule=constant", *SMALL]
    start("trunk", f"data.path={training_data}", "train.steps=2", *fixed)
    start("whole", blend, "train.steps=6", *fixed, "--resume", str(tmp_path / "trunk"))
    start("parts", blend, "train.steps=4", *fixed, "--resume", str(tmp_path / "trunk"))
    start("parts", blend, "train.steps=6", *fixed, "--resume", "auto")
    assert curve(tmp_path / "parts", "loss") == curve(tmp_path / "whole", "loss")
    mixes = store_of(tmp_path / "parts", 6).state["data"]["mixes"]
    assert [mix["from_sample"] for mix in mixes] == [0, 16]
    changed = [event["field"] for event in events(tmp_path / "parts") if event["event"] == "changed"]
    assert changed == ["data.path", "train.steps", "data.blend", "train.steps"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero1-dp2", "pipeline-tp2pp2"])
def test_another_optimizer_from_here_on(start: Start, tmp_path: Path, layout: str) -> None:
    """Named on the command line, it is taken and kept from then on, and a run stopped within it continues bitwise."""
    num_processes, degrees = LAYOUTS[layout]
    fixed = ["optim.schedule=constant", *SMALL, *degrees]
    start("trunk", "train.steps=3", "optim.name=muon", *fixed, num_processes=num_processes)
    trunk, file = tmp_path / "trunk", tmp_path / "adamw.yaml"
    file.write_text("optim:\n  name: adamw\n")
    command = ["train.steps=5", *fixed, "--config", str(file), "--resume", "auto"]
    refused = start("trunk", *command, num_processes=num_processes, code=ExitCode.BAD_INPUT)
    assert "optim.name = 'adamw': the run to be resumed has muon; if the change is meant" in refused.stderr
    branch = [*fixed, "optim.name=adamw", "--resume", str(trunk)]
    result = start("whole", "train.steps=7", *branch, num_processes=num_processes)
    notice = "AdamW begins anew, with moments of zero, for 18 parameters (blocks.0.attention.q.down.weight to "
    assert notice in result.stdout and "optim.name: muon -> adamw" in result.stdout
    start("parts", "train.steps=5", *branch, num_processes=num_processes)
    result = start("parts", "train.steps=7", *fixed, "--resume", "auto", num_processes=num_processes)
    assert "begins anew" not in result.stdout
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert curve(parts, "loss") == curve(whole, "loss")
    assert_bitwise_equal(store_of(whole, 7), store_of(parts, 7))
    engine = store_of(parts, 7).state["engine"]
    assert engine["optimizer_step"] == 7 and set(engine["adam_begun_at"].values()) == {3}


@pytest.mark.slow
def test_a_new_run_begins_with_given_weights(start: Start, tmp_path: Path, training_data: Path) -> None:
    start("trunk", "train.steps=3", *SMALL)
    trunk = store_of(tmp_path / "trunk", 3)
    values = trunk.model.model_dump(mode="json")
    weights = ((name, trunk.tensor(name)) for name in trunk.table)
    folder = write_weights(tmp_path / "weights", values, weights, training_data / "tokenizer", {"from": "trunk"})
    arguments = ["evaluation.every=2", "train.seed=99", "train.steps=2", *SMALL[:3]]
    result = start("run", *arguments, "--resume", str(folder), num_processes=2)
    assert f"begins with the weights of {folder}" in result.stdout
    assert curve(tmp_path / "run", "validation_loss")[0] == pytest.approx(
        curve(tmp_path / "trunk", "validation_loss")[3], rel=1e-6
    )
    assert [event["event"] for event in events(tmp_path / "run")][:2] == ["start", "initialized_from"]
    assert store_of(tmp_path / "run", 2).state["engine"]["optimizer_step"] == 2, "its optimizer began anew"
    refused = start("other", "model.num_heads=2", *SMALL, "--resume", str(folder), code=ExitCode.BAD_INPUT)
    assert "model.num_heads = 2: the weights to begin with have 4" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_flipped_bit_in_the_weights_is_found_before_they_are_used(
    start: Start, tmp_path: Path, num_processes: int
) -> None:
    """Sizes tell nothing here: the ranks compare checksums together, fall back together, and say so."""
    fixed = ["train.steps=6", "checkpoint.every=2", "checkpoint.keep_last=9", "optim.schedule=constant", *SMALL]
    fixed += ["parallel.tensor=2"] if num_processes == 2 else []
    start("run", *fixed, num_processes=num_processes)
    run = tmp_path / "run"
    before, bad = curve(run, "loss"), store_of(run, 6).folder / f"rank-{num_processes - 1:05d}.safetensors"
    content = bytearray(bad.read_bytes())
    content[-100] ^= 4
    bad.write_bytes(content)
    command = [*fixed, "train.steps=8"]
    refused = start("run", *command, "--resume", str(bad.parent), num_processes=num_processes, code=ExitCode.BAD_INPUT)
    assert refused.stderr.count("its sha256 is not the manifest's") == 1 and "Traceback" not in refused.stderr
    result = start("run", *command, "--resume", "auto", num_processes=num_processes)
    assert "fallback: " in result.stdout and f"resumed from {run / 'checkpoints' / 'step-00000004'}" in result.stdout
    (fallback,) = [event for event in events(run) if event["event"] == "fallback"]
    assert fallback["passed_over"] == str(bad.parent) and bad.name in fallback["reason"]
    assert {step: loss for step, loss in curve(run, "loss").items() if step <= 6} == before
    assert list(curve(run, "loss")) == list(range(1, 9))
    assert Store.open(bad.parent).verify() == [], "saved anew on the way"
