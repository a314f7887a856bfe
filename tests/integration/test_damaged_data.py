"""Data that change between two starts, or under a run, end it with exit code 2 and the name of the file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlra_scale.data.blocks import BLOCK_BYTES
from mlra_scale.data.indexed import WHOLE_BYTES, open_indexed
from mlra_scale.data.manifest import content_fingerprint, manifest_text, read_manifest
from mlra_scale.data.writer import SplitWriter
from mlra_scale.training.exit_codes import ExitCode
from tests.support.training_runs import Start, curve, events, metrics


@pytest.fixture
def large(training_data: Path, tmp_path: Path) -> Path:
    """The training data many times over: a train.bin whose content is checked only where it is read."""
    folder = Path(shutil.copytree(training_data, tmp_path / "large"))
    files = open_indexed(str(folder / "train"))
    document = np.array(files.tokens())
    writer = SplitWriter(folder / "train", files.dtype)
    for _ in range(WHOLE_BYTES // document.nbytes + 1):
        writer.add(document, np.array([len(document)], np.int32))
    manifest = read_manifest(training_data)
    sums, content, tokenizer = manifest.files | writer.finish(), manifest.content, manifest.tokenizer
    content["files"] = {name: entry.model_dump() for name, entry in sums.items()}
    content["splits"]["train"] = {"documents": writer.documents, "tokens": writer.tokens}
    for name in ("documents", "tokens"):
        content[name] = sum(split[name] for split in content["splits"].values())
    content["sources"][0]["documents"] = content["documents"]
    content["fingerprint"] = content_fingerprint(sums, tokenizer.sha256, tokenizer.end_of_document_token)
    (folder / "manifest.json").write_text(manifest_text(content))
    assert (folder / "train.bin").stat().st_size > WHOLE_BYTES
    return folder


def overwrite(path: Path) -> None:
    """Replaces all tokens by others of the same vocabulary."""
    np.roll(np.fromfile(path, np.uint16), 12_345).tofile(path)


def test_tokens_that_were_overwritten_between_two_starts(start: Start, training_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(training_data, tmp_path / "data"))
    start("run", f"data.path={data}", "train.steps=1")
    overwrite(data / "train.bin")
    refused = start("run", f"data.path={data}", "train.steps=2", "--resume", "auto", code=ExitCode.BAD_INPUT)
    assert f"{data / 'train.bin'} is damaged" in refused.stderr and "at offset 0" in refused.stderr
    assert [record["step"] for record in metrics(tmp_path / "run")][-1] == 1


@pytest.mark.slow
def test_a_block_found_damaged_while_training_costs_no_step(start: Start, large: Path, tmp_path: Path) -> None:
    """Every rank stops after the last good step and saves; the mended file continues as if nothing had happened."""
    whole = (large / "train.bin").read_bytes()
    damaged = bytearray(whole)
    for offset in range(0, len(whole), 60 * BLOCK_BYTES):
        damaged[offset : offset + BLOCK_BYTES] = damaged[offset + BLOCK_BYTES : offset + 2 * BLOCK_BYTES]
    (large / "train.bin").write_bytes(damaged)
    arguments = [f"data.path={large}", "train.steps=40", "tev.every=0", "checkpoint.every=0", "--resume", "auto"]
    ended = start("run", *arguments, num_processes=2, code=ExitCode.BAD_INPUT)
    assert ended.stderr.count(f"{large / 'train.bin'} is damaged: its blocks of {BLOCK_BYTES} bytes at offset") == 1
    assert "Traceback" not in ended.stderr
    stopped = events(tmp_path / "run")[-1]
    assert (stopped["event"], stopped["exit_code"]) == ("stopped", ExitCode.BAD_INPUT) and stopped["step"] > 2
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().split()[0] == f"step-{stopped['step'] - 1:08d}"
    (large / "train.bin").write_bytes(whole)
    start("run", *arguments, num_processes=2)
    start("reference", *arguments, num_processes=2)
    assert list(curve(tmp_path / "run", "loss")) == list(range(1, 41))
    assert curve(tmp_path / "run", "loss") == curve(tmp_path / "reference", "loss")


def test_a_run_on_data_of_an_earlier_version_says_so_once(start: Start, tmp_path: Path) -> None:
    written = Path(__file__).resolve().parents[1] / "fixtures" / "written_by_3a017c2"
    data = Path(shutil.copytree(written / "data", tmp_path / "data"))
    begun = start("run", f"data.path={data}", "train.steps=1")
    assert begun.stdout.count("was prepared by an earlier version") == 1
    # Another end of documents, which a checkpoint of that version does not know, is refused as well.
    content = json.loads((data / "manifest.json").read_text())
    content["tokenizer"]["end_of_document_token"] = 7
    (data / "manifest.json").write_text(json.dumps(content))
    refused = start("run", f"data.path={data}", "--resume", "auto", "train.steps=2", code=ExitCode.BAD_INPUT)
    assert f"{data / 'manifest.json'} was changed by hand" in refused.stderr
