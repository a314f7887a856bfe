"""tools/prepare_data.py from end to end: text in, data set out, and nothing left behind when it goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from mlra_scale.cli.prepare import COMMAND
from mlra_scale.config import load_config
from mlra_scale.data import DataError, check_data
from mlra_scale.data.manifest import Manifest, manifest_text, read_manifest
from mlra_scale.data.tokenizer import save_tokenizer, train_bpe
from tests.support.processes import Program, tool
from tests.unit.data.builders import flip, gpt2_files, write_jsonl

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
TRAIN_BPE = ["--train-bpe", "300"]
GOOD = "IN/good.jsonl"


def texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    words = ["caf\u00e9", "\u65e5\u672c", "\U0001f642", "<|endoftext|>", "  two", "\r\n", "\tdef f(x):\n    return x"]
    words += ["Hello world", *(f"word{i}" for i in range(60))]
    return [f"{i}: " + " ".join(chance.choices(words, k=chance.randint(1, 60))) for i in range(count)]


def run(*arguments: object) -> int:
    return COMMAND.main([*map(str, arguments), "--quiet"])


def stored_documents(folder: Path) -> list[list[int]]:
    found = []
    for split in ("train", "validation"):
        data = IndexedDataset(str(folder / split))
        found += [data[i].tolist() for i in range(len(data))]
    return found


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_jsonl_and_parquet_with_the_real_gpt2_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # must-show 7: exact round trip of every document, through the tokenizer that lies beside the data
    source = tmp_path / "in"
    source.mkdir()
    content = texts(90)
    write_jsonl(source / "a.jsonl", content[:30])
    write_jsonl(source / "b.jsonl.gz", content[30:50])
    pyarrow.parquet.write_table(pyarrow.table({"text": content[50:80]}), source / "c.parquet")
    for index, text in enumerate(content[80:]):
        (source / f"d{index}.txt").write_bytes(text.encode())
    out = tmp_path / "out" / "set"
    assert (
        run("--output", out, "--source", source, "--tokenizer", *gpt2_files().iterdir(), "--validation-fraction", 0.2)
        == 0
    )
    manifest = read_manifest(out)
    assert (manifest.tokenizer.vocabulary_size, manifest.tokenizer.end_of_document_token) == (50257, 50256)
    assert manifest.dtype == "uint16" and manifest.tokenizer.round_trip_is_exact
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    stored = stored_documents(out)
    assert all(document[-1] == 50256 and 50256 not in document[:-1] for document in stored)
    # Every document is in exactly one split.
    assert sorted(tokenizer.decode(document[:-1]) for document in stored) == sorted(content)
    assert manifest.documents == 90 and manifest.tokens == sum(map(len, stored))
    assert manifest.text_bytes == sum(len(text.encode()) for text in content)
    assert manifest.splits["validation"].documents > 0
    files = digests(out)
    for name, entry in manifest.content["files"].items():
        assert entry == {"bytes": (out / name).stat().st_size, "sha256": files[name]}
    printed = capsys.readouterr().out
    assert "90 documents" in printed and f"data.path={out}" in printed and "model.vocab_size=50257" in printed
    assert sorted(os.listdir(out.parent)) == ["set"]


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(3000), field="body")
    found = []
    for workers in (1, 3):
        out = tmp_path / f"with-{workers}"
        assert run("--output", out, "--source", source, "--field", "body", *TRAIN_BPE, "--workers", workers) == 0
        found.append(digests(out))
    assert found[0] == found[1] and {"train.bin", "train.idx", "manifest.json"} <= set(found[0])


def test_the_embedded_corpus_is_the_default(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert run("--output", out, "--train-bpe", 1000, "--max-bytes", "3e5") == 0
    content = read_manifest(out).content
    (source,) = content["sources"]
    assert (source["name"], source["kind"], source["documents"]) == ("python-docs", "embedded", content["documents"])
    assert source["files"]["not_read"][-1]["reason"] == "beyond --max-bytes"
    assert 3e5 <= content["text_bytes"] < 1e6
    assert content["tokenizer"]["vocabulary_size"] == 1000 and content["max_bytes"] == 300_000


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "test.jsonl", texts(50))
    out = tmp_path / "set"
    choice = ["--split", "test", *TRAIN_BPE, "--validation-fraction", "0.1"]
    assert run("--output", out, "--source", f"hf:{tmp_path / 'hub'}", *choice) == 0
    assert read_manifest(out).documents == 50


def test_the_split_belongs_to_seed_and_index(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(300))

    def validation(*more: object) -> set[tuple[int, ...]]:
        assert run("--output", tmp_path / "set", "--source", source, "--overwrite", *TRAIN_BPE, *more) == 0
        data = IndexedDataset(str(tmp_path / "set" / "validation"))
        return {tuple(data[i].tolist()) for i in range(len(data))}

    # The tokenizer is trained on the training split, so tokens are comparable between equal splits only.
    small = validation("--validation-fraction", 0.1)
    assert 10 < len(small) < 60 and small == validation("--validation-fraction", 0.1)
    assert small != validation("--validation-fraction", 0.1, "--seed", 1)


def test_files_that_are_not_read_are_said_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, content = tmp_path / "in", tmp_path / "set", texts(100)
    source.mkdir()
    write_jsonl(source / "A.JSONL", content[:40])
    write_jsonl(source / "b.json.gz", ["", *content[40:80]])
    write_jsonl(source / "c.json", content[80:])
    write_jsonl(source / "d.jsonl.zst", [])
    (source / "e.jsonl").symlink_to(source / "c.json")
    (source / "f.csv").write_text("text\n")
    assert run("--output", out, "--source", source, *TRAIN_BPE, "--validation-fraction", "0.1") == 0
    files = {
        "matched": 6,
        "read": 4,
        "without_documents": {"files": 1, "names": [str(source / "d.jsonl.zst")]},
        "not_read": [
            {"reason": "the same file under a second name", "files": 1, "names": [str(source / "e.jsonl")]},
            {"reason": "of no known kind", "files": 1, "names": [str(source / "f.csv")]},
        ],
    }
    entry = {"name": str(source), "kind": "files", "documents": 100, "empty_documents": 1, "files": files}
    assert read_manifest(out).content["sources"] == [entry]
    assert f"  files       4 of 6 read of {source}\n" in capsys.readouterr().out
    # Each start reads the counts; a manifest of version 1 has no checksum of its own.
    wrong = json.loads((out / "manifest.json").read_text().replace('"matched": 6', '"matched": 7'))
    (out / "manifest.json").write_text(manifest_text(wrong))
    config = load_config("debug", None, None, [f"data.path={out}"])
    assert ["it counts 7 files of source" in str(problem) for problem in check_data(config)] == [True]


def test_documents_that_the_tokenizer_makes_nothing_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters, words = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1}, [])), {"<|endoftext|>": 0, "a": 1}
    letters.save(str(tmp_path / "letters.json"))
    Tokenizer(models.WordLevel(words)).save(str(tmp_path / "words.json"))  # it has no token for unknown words
    source, out = write_jsonl(tmp_path / "a.jsonl", ["a"] * 40 + ["new"] * 3), tmp_path / "set"
    choice = ["--output", out, "--source", source, "--validation-fraction", "0.1"]
    assert run(*choice, "--tokenizer", tmp_path / "words.json") == 2
    assert "the tokenizer cannot encode every text: WordLevel error" in capsys.readouterr().err
    assert run(*choice, "--tokenizer", tmp_path / "letters.json") == 0
    assert "3 documents have text of which this tokenizer makes no token" in capsys.readouterr().out
    assert sum(document == [0] for document in stored_documents(out)) == 3


# One per stage at which it can end; the unit tests of sources and tokenizers have every message.
BAD_INPUTS: dict[str, tuple[list[str], str]] = {
    "no such file": (["--source", "IN/none.jsonl", *TRAIN_BPE], "none.jsonl does not exist"),
    "while the BPE is trained": (["--source", "IN/bad.jsonl", *TRAIN_BPE], "bad.jsonl, line 2: not JSON"),
    "while it is tokenized": (["--source", "IN/bad.jsonl", "--tokenizer", "IN/small.json"], "bad.jsonl, line 2: not"),
    "empty corpus": (["--source", "IN/empty.jsonl", *TRAIN_BPE], "the corpus is empty"),
    "empty corpus, tokenizer": (["--source", "IN/empty.jsonl", "--tokenizer", "IN/small.json"], "the corpus is empty"),
    "no validation": (["--source", GOOD, "--validation-fraction", "1e-9", *TRAIN_BPE], "the validation split"),
    "no training": (["--source", GOOD, "--validation-fraction", "0.999999999", *TRAIN_BPE], "the train split"),
    "fraction": (["--source", GOOD, "--validation-fraction", "1", *TRAIN_BPE], "is not between 0 and 1"),
    "tiny vocabulary": (["--source", GOOD, "--train-bpe", "100"], "need 257 tokens"),
    "no tokenizer file": (["--source", GOOD, "--tokenizer", "IN/t.json"], "t.json does not exist"),
    "taken": (["--source", GOOD, "--output", "IN", *TRAIN_BPE], "was not made by this tool"),
    "link": (["--source", GOOD, "--output", "IN/link", *TRAIN_BPE], "link cannot be written: it is a link to a place"),
    "long": (["--source", GOOD, "--output", "IN/" + 300 * "a", *TRAIN_BPE], "cannot be written: File name too long"),
    "end": (["--source", GOOD, "--end-of-document", "<end>", *TRAIN_BPE], "a BPE that is trained here end with <|end"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_message_code_2_and_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments, message = BAD_INPUTS[name]
    source, out = tmp_path / "in", tmp_path / "deep" / "out"
    source.mkdir()
    write_jsonl(source / "good.jsonl", texts(20))
    (source / "bad.jsonl").write_text('{"text": "good"}\n{"text": "cut off\n')
    (source / "empty.jsonl").write_text('{"text": ""}\n\n')
    train_bpe(texts(20), 280).tokenizer.save(str(source / "small.json"))
    (source / "link").symlink_to("nowhere")
    before = digests(tmp_path)
    assert run("--output", out, *(argument.replace("IN", str(source), 1) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("prepare: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert digests(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["in"]


@pytest.mark.parametrize("arguments", [[], ["--train-bpe", "300"], ["--output", "x"]])
def test_bad_flags_end_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMAND.main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("flag", "values", "message"),
    [
        (
            "--train-bpe",
            ["few", "4k", "inf", "nan", "-inf", "1e300", "2.5", "0", "-300", ""],
            "from 1 to 10000000 (10e6",
        ),
        ("--train-bpe-bytes", ["inf", "1e19", "x"], "is not a whole number from 1 to"),
        ("--max-bytes", ["inf", "0.5"], "is not a whole number from 1 to"),
        ("--workers", ["0", "inf", "1e9"], "is not a whole number from 1 to 1024"),
        ("--seed", ["-1", "1.5", "x", str(2**63)], "is not a whole number from 0 to 2^63 - 1"),
        ("--output", ["", "\udce9"], "is not"),
        ("--validation-fraction", ["1 %", "x"], "is not a number between 0 and 1"),
    ],
)
def test_bad_numbers_name_flag_and_range(
    capsys: pytest.CaptureFixture[str], flag: str, values: list[str], message: str
) -> None:
    for value in values:
        with pytest.raises(SystemExit) as ended:
            COMMAND.main(["--output", "x", "--train-bpe", "300", f"{flag}={value}"], "prepare_data.py")
        error = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and error.startswith(f"prepare_data.py: error: argument {flag}: {value!r} is not")
        assert message in error


def test_what_cannot_be_read_back_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", texts(300)), tmp_path / "set"
    choice = ["--output", out, "--source", source, "--overwrite", *TRAIN_BPE]
    assert run(*choice) == 0
    assert f"{out}: 300 documents" in capsys.readouterr().out, "where it is now, and not where it was made"
    before = digests(out)

    def refused(folder: Path) -> Manifest:
        raise DataError(f"{folder} is damaged")

    monkeypatch.setattr("mlra_scale.data.prepare.read_manifest", refused)
    assert run(*choice, "--seed", "1") == 2 and "is damaged" in capsys.readouterr().err
    assert digests(out) == before and sorted(os.listdir(tmp_path)) == ["a.jsonl", "set"]


def test_verify_needs_no_other_option_and_says_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], training_data: Path
) -> None:
    data = Path(shutil.copytree(training_data, tmp_path / "data"))

    def verified(folder: Path) -> tuple[object, str, str]:
        try:
            code: object = COMMAND.main(["--verify", str(folder)])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, err = verified(data)
    assert (code, err) == (0, "") and f"{data / 'train.bin'}: " in out
    flip(data / "train.bin", 70_000, 4)
    code, out, err = verified(data)
    assert code == 2 and err.startswith(f"prepare: error: {data / 'train.bin'} is damaged")
    assert "at offset 65536 differ" in err and err.count("\n") == 1
    code, _, err = verified(tmp_path)
    assert code == 2 and f"{tmp_path} has no manifest.json" in err


def test_the_hub_out_of_reach_is_reported_soon_once_and_with_a_remedy(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    connections: list[int] = []

    def hang_up() -> None:
        with contextlib.suppress(OSError):  # the server is closed at the end
            while True:
                server.accept()[0].close()
                connections.append(1)

    threading.Thread(target=hang_up, daemon=True).start()
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, str(TOOL), "--output", str(tmp_path / "set"), "--quiet", "--workers", "1"]
    for choice, remedy in (
        (["--tokenizer", "gpt2"], "name a local folder with its files"),
        (["--source", "hf:wikitext", *TRAIN_BPE], "name its folder or files as the source"),
    ):
        connections.clear()
        result = subprocess.run([*command, *choice], env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
        assert f"{address} does not answer" in result.stderr and remedy in result.stderr
        assert len(connections) <= 3  # the libraries' own retries are more, and take most of a minute
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    assert not (tmp_path / "set").exists()


@pytest.mark.slow_except("SIGKILL")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    source, out = folder / "a.jsonl", folder / "set"
    # Some seconds of work: it is caught after the first chunks.
    source.write_bytes(b"".join(json.dumps({"text": text * 20}).encode() + b"\n" for text in texts(2000)) * 4)
    save_tokenizer(train_bpe(texts(50), 300), folder / "tokenizer")
    choice = ["--tokenizer", str(folder / "tokenizer" / "tokenizer.json"), "--workers", "2", "--quiet"]
    command = [*tool("prepare_data"), "--output", str(out), "--source", str(source), *choice]
    program, half = Program(command, tmp_path / "log"), folder / ".set.partial" / "train.bin"
    program.wait_until(lambda: half.is_file() and half.stat().st_size > 0)
    assert len(program.left()) > 2
    program.signal(signal.Signals[name])
    code = program.wait(60, end=False)
    assert not out.exists()
    if name == "SIGTERM":
        assert (code, program.output()) == (130, "prepare_data: interrupted; nothing was left behind\n")
        assert sorted(os.listdir(folder)) == ["a.jsonl", "tokenizer"]
    else:
        assert code == -signal.SIGKILL and half.exists()
    # The workers end with their parent, however it ended.
    program.assert_nothing_is_left(60)
    write_jsonl(source, texts(100))
    assert run("--output", out, "--source", source, "--validation-fraction", "0.1", *TRAIN_BPE) == 0
    assert sorted(os.listdir(folder)) == ["a.jsonl", "set", "tokenizer"]
    assert read_manifest(out).documents == 100


@pytest.mark.slow
def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", [text * 20 for text in texts(3000)]), tmp_path / "set"
    # Each chunk is committed, not only those that a minute takes.
    code = (
        "import sys; from mlra_scale.data import build; build.SECONDS_BETWEEN_COMMITS = 0.0; "
        "from mlra_scale.cli.prepare import COMMAND; sys.exit(COMMAND.start(sys.argv[1:], 'prepare_data.py'))"
    )
    choice = ["--source", str(source), *TRAIN_BPE, "--train-bpe-bytes", "1e5", "--workers", "2", "--quiet"]
    progress = tmp_path / ".set.partial" / "progress.json"
    found: set[str] = set()

    def has_progressed() -> bool:
        return progress.is_file() and progress.read_text() not in found

    for number, end in enumerate((signal.SIGKILL, signal.SIGTERM)):
        program = Program([sys.executable, "-c", code, "--output", str(out), *choice], tmp_path / f"log-{number}")
        program.wait_until(has_progressed)
        program.signal(end)
        program.wait(60, end=False)
        program.assert_nothing_is_left(60)
        found.add(progress.read_text())
    kept = f"interrupted; what is done so far is kept in {tmp_path / '.set.partial'}: the same command continues there"
    assert kept in program.output() and "continuing after" in program.output()
    assert run("--output", out, *choice) == 0 and run("--output", tmp_path / "whole", *choice) == 0
    assert digests(out) == digests(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "log-0", "log-1", "set", "whole"]
