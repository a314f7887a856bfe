"""tools/export_hf.py on a run that was trained, and what others make of the folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from mlra_scale.checkpoint.huggingface import exporting
from mlra_scale.checkpoint.huggingface.tensors import FORMATS, ExportTensor
from mlra_scale.checkpoint.huggingface.verification import VerificationError, loaded_model
from mlra_scale.checkpoint.retention import checkpoint_at
from mlra_scale.data.manifest import read_manifest
from mlra_scale.data.tokenizer import save_tokenizer, train_bpe
from tests.support.pool import WorkerPool
from tests.support.tools import Ran, run_tool
from tests.support.training_runs import ROOT, environment, main_on_rank

STEPS = 20


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, training_data: Path, worker_pool: Callable[[int], WorkerPool]
) -> Path:
    """A run of the debug preset with two checkpoints."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    arguments = [f"train.steps={STEPS}", "checkpoint.every=10", "optim.lr=5e-3", "optim.warmup_steps=2"]
    command = ("--preset", "debug", "--run-dir", str(folder), f"data.path={training_data}", *arguments)
    (finished,) = worker_pool(1).run(main_on_rank, command)
    assert finished.code == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, run: Path) -> dict[str, Path]:
    """The newest checkpoint in both formats."""
    place = tmp_path_factory.mktemp("exports")
    for export_format in FORMATS:
        exported(run, place / export_format, "--format", export_format)
    return {export_format: place / export_format for export_format in FORMATS}


def exported(*arguments: object) -> Ran:
    result = run_tool("export_hf", *arguments)
    assert result.code == 0, result.stderr
    return result


def refused(code: int, *arguments: object) -> str:
    """Runs the tool, which must end with this code and one message."""
    result = run_tool("export_hf", *arguments)
    assert result.code == code, (result.code, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.slow
def test_a_process_of_its_own_prints_no_warnings_of_libraries(run: Path, tmp_path: Path) -> None:
    """They are printed at imports, which have happened long ago in the process of the other tests."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "export_hf.py"),
        str(run),
        str(tmp_path / "out"),
        "--format",
        "mlra",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_a_run_is_its_newest_checkpoint_and_is_verified_on_its_own_data(run: Path, tmp_path: Path) -> None:
    result = exported(run, tmp_path / "out")
    assert f"checkpoint {checkpoint_at(run)}: " in result.stdout and f"step-{STEPS:08d}" in result.stdout
    assert "(bound 0.0001)" in result.stdout and "verified on the run's validation data" in result.stdout
    assert result.stderr == ""
    exported(run / "checkpoints" / "step-00000010", tmp_path / "earlier")
    models = [GPT2LMHeadModel.from_pretrained(tmp_path / name) for name in ("out", "earlier")]
    assert not torch.equal(models[0].transformer.wte.weight, models[1].transformer.wte.weight)


def test_the_card_has_the_runs_facts(run: Path, exports: dict[str, Path], training_data: Path) -> None:
    card = (exports["gpt2"] / "README.md").read_text()
    state = json.loads((checkpoint_at(run) / "state.json").read_text())
    facts = [
        f"optimizer steps | {STEPS} of {STEPS}",
        f"tokens | {state['progress']['consumed_tokens']:,}",
        f"validation loss | {state['validation_loss']:.4f} nats per token after step {STEPS} |",
        f"data | {training_data.name} |",
        f"fingerprint of data.path | {state['data_fingerprints']['data.path']} |",
        "layout | world_size 1, tensor 1, pipeline 1",
        "learning rate | 0.005, cosine, 2 steps of warm-up",
        "documents | see each other within a sequence |",
        "same likeliest token | 100.00 %",
    ]
    assert [fact for fact in facts if fact not in card] == []
    assert str(training_data.parent) not in card, "where things lay is nobody's business"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_exports_of_a_trained_run(run: Path, tmp_path: Path, dtype: str) -> None:
    result = exported(run, tmp_path / "out", "--dtype", dtype, "--max-shard-size", "100kB")
    assert f"twice that of the trainer's own layers in {dtype}" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2


def test_stock_processes_load_both_formats_and_write_the_same(exports: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel\n"
        "texts = {}\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code='mlra' in folder)\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code='mlra' in folder)\n"
        "    tokenizer.pad_token = tokenizer.eos_token\n"
        "    prompts = ['Return the', 'If the argument is a']\n"
        "    inputs = tokenizer(prompts, padding=True, padding_side='left', return_tensors='pt')\n"
        "    for cache in (True, False):\n"
        "        tokens = model.generate(**inputs, max_new_tokens=20, use_cache=cache)\n"
        "        texts[f'{type(model).__name__} {cache}'] = tokenizer.batch_decode(tokens)\n"
        "assert not any(name.startswith('mlra_scale') for name in sys.modules)\n"
        "print(json.dumps(texts))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(exports["gpt2"]), str(exports["mlra"])],
        capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    texts = json.loads(result.stdout.splitlines()[-1])
    assert list(texts) == [
        "GPT2LMHeadModel True", "GPT2LMHeadModel False", "MlraForCausalLM True", "MlraForCausalLM False",
    ]  # fmt: skip
    assert len({json.dumps(written) for written in texts.values()}) == 1, texts
    assert all("Return the" in written[0] for written in texts.values())


def test_ctranslate2_scores_as_the_checkpoint_does(exports: dict[str, Path], tmp_path: Path) -> None:
    """A consumer that is not transformers' model code gives the same log-probabilities of tokens."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs ctranslate2 (the dev extra)")
    ctranslate2.converters.TransformersConverter(str(exports["gpt2"])).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(exports["gpt2"])
    texts = ["Return a list of the names in the module.", "If the argument is a string, it must not be empty."]
    rows = [tokenizer(text).input_ids[:40] for text in texts]
    scored = generator.score_batch([tokenizer.convert_ids_to_tokens(row) for row in rows])
    for row, result in zip(rows, scored, strict=True):
        assert result.tokens == tokenizer.convert_ids_to_tokens(row)[1:]
        expected = expected_scores(exports["mlra"], row)
        difference = max(abs(a - b) for a, b in zip(result.log_probs, expected, strict=True))
        print(f"ctranslate2: token log-probabilities differ by {difference:.1e}")
        assert difference < 1e-3
        assert max(expected) - min(expected) > 1, "a trained model, which does not find all tokens alike"


def expected_scores(folder: Path, tokens: list[int]) -> list[float]:
    """Log-probabilities by the export that keeps the factors."""
    with loaded_model(folder, "mlra", torch.float32) as model, torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
    return scores[range(len(tokens) - 1), tokens[1:]].tolist()


def test_a_folder_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="does not load"), loaded_model(tmp_path, "gpt2", torch.float32):
        raise AssertionError("nothing is there")


def test_a_bad_export_ends_with_code_1_and_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = exporting.export_tensors

    def without_a_bias(*arguments: Any) -> list[ExportTensor]:
        return [
            ExportTensor(tensor.name, tensor.shape, lambda tensor=tensor: tensor.make() + 0.1)  # type: ignore[misc]
            if tensor.name == "transformer.h.0.mlp.c_fc.bias"
            else tensor
            for tensor in original(*arguments)
        ]

    monkeypatch.setattr(exporting, "export_tensors", without_a_bias)
    message = refused(1, run, tmp_path / "out")
    assert "failed its verification and was removed: its logits are not the trained model's" in message
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_gone_are_told_with_the_way_out(run: Path, tmp_path: Path, training_data: Path) -> None:
    hidden = training_data.with_name("hidden")
    training_data.rename(hidden)
    try:
        message = refused(2, run, tmp_path / "out")
        assert str(training_data) in message and "name a text with --text" in message
        (tmp_path / "text.txt").write_text("Return a list of the names in the module, in the order of their use. " * 9)
        assert "verified on text.txt" in exported(run, tmp_path / "out", "--text", tmp_path / "text.txt").stdout
        assert "not verified" in exported(run, tmp_path / "unverified", "--no-verify").stdout
        assert "not compared" in (tmp_path / "unverified" / "README.md").read_text()
    finally:
        hidden.rename(training_data)


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000020"
    shutil.copytree(checkpoint_at(run), copy)
    (file,) = copy.glob("rank-*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    message = refused(2, copy, tmp_path / "out")
    assert str(file) in message and "sha256" in message and "use another checkpoint" in message
    assert not (tmp_path / "out").exists()
    exported(copy, tmp_path / "out", "--no-checksums")


def test_bad_input_is_refused_before_any_work(run: Path, tmp_path: Path, exports: dict[str, Path]) -> None:
    assert "does not exist" in refused(2, tmp_path / "nowhere", tmp_path / "out")
    assert "no complete checkpoint" in refused(2, tmp_path, tmp_path / "out")
    assert "give --force to replace it" in refused(2, run, exports["gpt2"])
    assert "not an export of this tool" in refused(2, run, run, "--force")
    assert "lies in the checkpoint" in refused(2, run, checkpoint_at(run) / "exported")
    sizes = [["--max-shard-size", size] for size in ("big", "1,5GB", "1.5.2GB", "5-GB", "5 GB x", "5gbit", "0")]
    for arguments in (["--dtype", "int8"], ["--format", "onnx"], *sizes, ["--tokens", "0"]):
        assert arguments[1] in refused(2, run, tmp_path / "out", *arguments)
    (tmp_path / "empty.txt").touch()
    assert "tokens" in refused(2, run, tmp_path / "out", "--text", tmp_path / "empty.txt")
    assert "File name too long; name another output" in refused(2, run, tmp_path / ("x" * 250), "--no-verify")
    assert "nowhere" in refused(2, run, tmp_path / "out", "--tokenizer", "./nowhere")
    save_tokenizer(train_bpe(["quite another text " * 9], 270), tmp_path / "other")
    assert "gives other tokens than" in refused(2, run, tmp_path / "out", "--tokenizer", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "other"]


def test_an_export_is_replaced_on_request(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out", "--no-verify")
    exported(run, tmp_path / "out", "--format", "mlra", "--force", "--tokens", "64")
    assert (tmp_path / "out" / "modeling_mlra.py").is_file()


def test_a_named_tokenizer_takes_the_place_of_the_checkpoints_own(
    run: Path, tmp_path: Path, training_data: Path
) -> None:
    source = read_manifest(training_data).tokenizer_folder / "tokenizer.json"
    exported(run, tmp_path / "out", "--tokenizer", source)
    tokens = [
        AutoTokenizer.from_pretrained(path)("Return a list").input_ids for path in (tmp_path / "out", source.parent)
    ]
    assert tokens[0] == tokens[1]
