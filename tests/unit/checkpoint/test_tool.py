"""The command checkpoints: what it prints, what it changes, how it ends."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mlra_scale.checkpoint import checkpoint_name, inspection, retention
from mlra_scale.cli.checkpoints import COMMAND
from mlra_scale.training import run_directory
from mlra_scale.training.run_directory import RunDirectory, run_lock
from tests.unit.checkpoint.builders import (
    MODEL,
    Layout,
    all_parts,
    flip_a_byte,
    parts_with,
    write_checkpoint,
    write_tokenizer,
)

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    def run(*arguments: Any) -> tuple[int, str, str]:
        code = COMMAND.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_run(folder: Path, *steps: int, **options: Any) -> Path:
    for step in steps:
        state = {"progress": {"step": step, "consumed_samples": 2 * step, "consumed_tokens": 1000 * step}}
        write_checkpoint(folder / "checkpoints", step, state=state, **options)
    return folder / "checkpoints"


def test_a_run_is_listed(tmp_path: Path, tool: Tool) -> None:
    folder = write_run(tmp_path, 10, 20, 30, layout=Layout(2, 1, 2))
    (folder / checkpoint_name(20) / "rank-00001.safetensors").unlink()
    (folder / ".unfinished-step-00000040").mkdir()
    for path in (tmp_path, folder):
        code, out, _ = tool("list", path)
        lines = out.splitlines()
        assert code == 0 and lines[0] == str(folder) and len(lines) == 6
        assert lines[1].startswith("  step-00000010  10,000 tokens   ") and "4 rank(s): tp2 pp1 dp2" in lines[1]
        assert lines[2].startswith("  step-00000020  INCOMPLETE: ") and "rank-00001.safetensors is missing" in lines[2]
        assert lines[3].startswith("* step-00000030  30,000 tokens")
        assert "being written, or left by a run that died" in lines[4]
    found = json.loads(tool("list", tmp_path, "--json")[1])
    assert [entry.get("step") for entry in found["checkpoints"]] == [10, None, 30, None]
    assert [entry["latest"] for entry in found["checkpoints"]] == [False, False, True, False]


def test_all_or_one_are_verified(tmp_path: Path, tool: Tool) -> None:
    folder = write_run(tmp_path, 10, 20)
    code, out, _ = tool("verify", tmp_path)
    assert code == 0 and out.count("all files are as they were written") == 2
    shard = folder / checkpoint_name(20) / "rank-00000.safetensors"
    flip_a_byte(shard)
    code, out, _ = tool("verify", tmp_path)
    assert code == 1 and f"{shard} is damaged" in out and out.count("all files are") == 1
    assert tool("verify", folder / checkpoint_name(10))[0] == 0
    shard.unlink()
    code, out, _ = tool("verify", folder / checkpoint_name(20), "--json")
    assert code == 1 and f"{shard} is missing" in json.loads(out)["faults"][str(shard.parent)][0]


def test_a_checkpoint_is_described(tmp_path: Path, tool: Tool) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    folder = write_run(tmp_path, 10, buffers={"v": torch.ones(2)}, tokenizer=tokenizer)
    code, out, _ = tool("describe", tmp_path)
    assert code == 0
    for text in (
        str(folder / checkpoint_name(10)),
        "training, with Adam's moments",
        "10, 20 samples, 10,000 tokens",
        "mlra of rank 4, 2 layers, width 8, 2 heads, vocabulary 21, 6 positions: ",
        f"{MODEL.num_parameters():,} parameters",
        "1 rank(s): tp1 pp1 dp1, zero engine, ZeRO 0, fp32",
        "buffers     v\n",
        "tokenizer   yes",
        "rank-00000.safetensors",
    ):
        assert text in out
    found = json.loads(tool("describe", folder / checkpoint_name(10), "--json")[1])
    assert found["tokens"] == 10_000 and found["model"]["rank"] == 4
    assert sum(found["files"].values()) == found["bytes"]


def test_momentum_is_described_and_compared(tmp_path: Path, tool: Tool) -> None:
    """A matrix of muon has no second moment to compare; one that only the other run has is a difference."""
    muon: dict[str, Any] = {"name": "muon"}
    adamw: dict[str, Any] = {"name": "adamw"}
    one = write_run(tmp_path / "one", 10, values=parts_with(**muon), optim=muon)
    assert "training, with Adam's moments, and of 18 matrices the momentum alone" in tool("describe", one)[1]
    assert json.loads(tool("describe", one, "--json")[1])["momentum_only"] == 18
    values = parts_with(**muon)
    values["exp_avg"]["blocks.1.mlp.fc_in.weight"][2] += 1.0
    two = write_run(tmp_path / "two", 10, values=values, optim=muon, layout=Layout(2, 1, 2))
    code, out, _ = tool("diff", one, two, "--moments")
    assert code == 1 and "exp_avg of blocks.1.mlp.fc_in.weight: largest difference 1, relative" in out
    assert "1 tensor(s) of the weights and moments differ" in out
    three = write_run(tmp_path / "three", 10, values=all_parts(), optim=adamw)
    code, out, _ = tool("diff", one, three, "--moments")
    assert code == 1 and "optim.name: 'muon' -> 'adamw'" in out
    assert out.count("exp_avg_sq of ") == out.count(": the first has the momentum alone") == 18
    assert tool("diff", three, one)[1].count("tensor(s) of the weights differ") == 1


def test_differences_are_found_whatever_the_layout(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_BLOCK_ELEMENTS", 16)  # so that a tensor is compared in several pieces
    values = all_parts()
    model = MODEL.model_copy(update={"vocab_padding_multiple": 8})
    one = write_run(tmp_path / "one", 10)
    code, out, _ = tool("diff", tmp_path / "one", write_run(tmp_path / "same", 10, layout=Layout(2, 2, 2)))
    assert code == 0 and "configuration and weights are equal, bit by bit" in out

    bias, down = "blocks.1.mlp.fc_out.bias", "blocks.0.attention.q.down.weight"
    values["weight"][bias][3] += 0.5
    values["weight"][down][2] = float("nan")
    values["exp_avg_sq"]["final_norm.weight"].mul_(1.25)
    two = write_run(tmp_path / "two", 20, values=values, layout=Layout(2))
    code, out, _ = tool("diff", one, two)
    assert code == 1 and "0 field(s) and 2 tensor(s) of the weights differ" in out
    assert f"{bias}: largest difference 0.5, relative " in out
    assert f"{down}: largest difference not finite, relative not finite" in out
    code, out, _ = tool("diff", one, two, "--moments", "--json")
    found = json.loads(out)
    assert code == 1 and [entry["part"] for entry in found["tensors"]] == ["weight", "weight", "exp_avg_sq"]
    last = found["tensors"][-1]
    assert last["name"] == "final_norm.weight" and last["relative"] == pytest.approx(0.25)

    padded = write_run(tmp_path / "padded", 10, values=all_parts(model), model=model)
    code, out, _ = tool("diff", one, padded)
    assert code == 1 and "model.vocab_padding_multiple: 4 -> 8" in out and "1 field(s) and 0 tensor(s)" in out


def test_another_model_is_told_by_its_shapes(tmp_path: Path, tool: Tool) -> None:
    model = MODEL.model_copy(update={"num_layers": 1, "max_positions": 5})
    one, two = write_run(tmp_path / "one", 1), write_run(tmp_path / "two", 1, values=all_parts(model), model=model)
    code, out, _ = tool("diff", one, two)
    assert code == 1
    assert "positions.weight: shape (6, 8) in the first, (5, 8) in the second" in out
    assert "blocks.1.mlp_norm.bias: shape (8,) in the first, None in the second" in out
    bare = write_run(tmp_path / "bare", 1, values={"weight": all_parts()["weight"]})
    code, _, err = tool("diff", one, bare, "--moments")
    assert code == 2 and "has no optimizer moments" in err


def test_pruning(tmp_path: Path, tool: Tool) -> None:
    folder = write_run(tmp_path, 10, 20, 30, 40)
    arguments = ("prune", tmp_path, "--keep-last", 1, "--keep-every", 20)
    code, out, _ = tool(*arguments, "--dry-run")
    assert code == 0
    assert out.splitlines() == [f"would remove {folder / checkpoint_name(step)}" for step in (10, 30)]
    assert len(retention.complete_checkpoints(folder)) == 4
    code, out, _ = tool(*arguments, "--json")
    assert code == 0 and json.loads(out)["removed"] == [str(folder / checkpoint_name(step)) for step in (10, 30)]
    assert [path.name for path in retention.complete_checkpoints(folder)] == ["step-00000020", "step-00000040"]
    assert tool(*arguments)[:2] == (0, "nothing to remove\n")


@pytest.mark.parametrize("has_pointer", [True, False])
def test_what_a_guard_may_have_to_go_back_to_is_not_pruned(tmp_path: Path, tool: Tool, has_pointer: bool) -> None:
    folder = tmp_path / "checkpoints"
    for step, good in ((10, 10), (20, 20), (30, 30), (40, 20)):
        write_checkpoint(folder, step, state={"windows": {"guard": {"good_step": good}}})
    if not has_pointer:
        (folder / "latest").unlink()
    left = [str(folder / checkpoint_name(step)) for step in (10, 30)]
    assert json.loads(tool("prune", tmp_path, "--keep-last", 1, "--dry-run", "--json")[1])["removed"] == left
    assert json.loads(tool("prune", tmp_path, "--keep-last", 1, "--json")[1])["removed"] == left


def test_a_run_at_work_is_not_pruned(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever way its folder is named."""
    folder = write_run(tmp_path, 10, 20)
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(folder)
    with run_lock(RunDirectory(tmp_path)), monkeypatch.context() as patch:
        patch.setattr(run_directory, "run_lock", partial(run_lock, seconds=0.0))
        patch.chdir(folder)
        for path in (tmp_path, folder, Path(), Path(".."), link):
            code, out, err = tool("prune", path, "--keep-last", 1)
            assert (code, out) == (2, "") and f"another run is at work here (process {os.getpid()}" in err, path
    assert len(retention.complete_checkpoints(folder)) == 2
    assert tool("prune", tmp_path, "--keep-last", 1)[0] == 0
    assert [path.name for path in retention.complete_checkpoints(folder)] == ["step-00000020"]


@pytest.mark.parametrize("command", ["list", "verify", "describe", "diff", "prune"])
def test_bad_input(tmp_path: Path, tool: Tool, command: str) -> None:
    more: dict[str, list[Any]] = {"diff": [tmp_path], "prune": ["--keep-last", 1]}
    options = more.get(command, [])
    for path in (tmp_path, tmp_path / "none"):
        code, out, err = tool(command, path, *options)
        assert (code, out) == (2, "") and err.startswith(f"checkpoints: error: {path} ")
    damaged = write_run(tmp_path, 10) / checkpoint_name(10)
    shutil.rmtree(damaged)
    damaged.write_text("")
    assert tool(command, tmp_path, *options)[0] == 2


@pytest.mark.parametrize("arguments", [[], ["prune", "x"], ["prune", "x", "--keep-last", "0"], ["tidy", "x"]])
def test_bad_command_lines(tool: Tool, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool(*arguments)
    assert stopped.value.code == 2
