"""The manifest: every file is read or named, the numbers add up, and a summary says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.data import DataError
from mlra_scale.data.files import NotRead, file_counts
from mlra_scale.data.manifest import FileSum, Manifest, content_fingerprint, manifest_text, read_manifest, summary
from mlra_scale.data.mixture import Component
from mlra_scale.data.options import PrepareOptions
from mlra_scale.data.prepare import prepare
from mlra_scale.data.sources import SourceName

SUM = "0123456789abcdef" * 4
NOT_READ = [NotRead(f"in/{i}.csv", "of no known kind") for i in range(12)] + [NotRead("in/.git", "hidden")]


def content() -> dict[str, Any]:
    files = {f"{split}.{end}": {"bytes": 4, "sha256": SUM} for split in SPLITS for end in ("bin", "idx", "blocks")}
    tokenizer = {"name": "t", "sha256": SUM, "vocabulary_size": 9, "end_of_document_token": 0}
    source = {"name": "in", "kind": "files", "documents": 7, "empty_documents": 2}
    return {
        "format": "mlra-scale-data",
        "version": 2,
        "fingerprint": content_fingerprint(dict.fromkeys(files, FileSum(bytes=4, sha256=SUM)), SUM, 0),
        "documents": 9,
        "tokens": 90,
        "text_bytes": 180,
        "dtype": "uint16",
        "empty_documents_left_out": 3,
        "documents_without_tokens": 2,
        "tokenizer": tokenizer | {"end_of_document_text": "<end>", "round_trip_is_exact": True},
        "splits": {"train": {"documents": 8, "tokens": 80}, "validation": {"documents": 1, "tokens": 10}},
        "files": files,
        "sources": [
            source | {"files": file_counts(4, ["in/a.jsonl"], NOT_READ)},
            {"name": "hf:x (split train)", "kind": "hugging-face", "documents": 2, "empty_documents": 1},
        ],
    }


SPLITS = ("train", "validation")


def read(folder: Path, values: dict[str, Any]) -> Manifest:
    (folder / "manifest.json").write_text(manifest_text(values))
    return read_manifest(folder)


def test_an_entry_has_every_number_and_the_first_names(tmp_path: Path) -> None:
    files = read(tmp_path, content()).content["sources"][0]["files"]
    assert (files["matched"], files["read"]) == (17, 4)
    assert files["without_documents"] == {"files": 1, "names": ["in/a.jsonl"]}
    assert [(group["reason"], group["files"], len(group["names"])) for group in files["not_read"]] == [
        ("of no known kind", 12, 10),
        ("hidden", 1, 1),
    ]


def test_the_lines_of_a_summary(tmp_path: Path) -> None:
    lines = summary(read(tmp_path, content()))
    assert lines[0] == f"{tmp_path}: 9 documents, 90 tokens, uint16"
    assert lines[3] == "  tokenizer   t: 9 tokens, documents end with <end> = 0, 2.00 bytes per token"
    assert lines[4:-1] == [
        "  files       4 of 17 read of in",
        "  not read    12 of no known kind: in/0.csv, in/1.csv, in/2.csv and 9 more",
        "  not read    1 hidden: in/.git",
        "  note        1 read without any document: in/a.jsonl",
        "  left out    3 empty documents",
        "  note        2 documents have text of which this tokenizer makes no token but the end's",
    ]


def test_names_that_are_no_text_are_recorded_so_that_they_can_be_printed(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9 \x1b[31m \xc3\xa4")
    source.mkdir()
    (source / "a.jsonl").write_text('{"text": "one text and another"}\n' * 40)
    (source / os.fsdecode(b"\xe9.csv")).touch()
    components = [Component("", [SourceName(str(source))])]
    options = PrepareOptions(tmp_path / "set", components, train_bpe=280, validation_fraction=0.2, progress=False)
    printed = f"{tmp_path}/caf\\udce9 \\x1b[31m \u00e4"
    assert summary(prepare(options)[0])[4:6] == [
        f"  files       1 of 2 read of {printed}",
        f"  not read    1 of no known kind: {printed}/\\udce9.csv",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(documents=10), "it counts 10 documents, their parts 9"),
        (lambda c: c.update(empty_documents_left_out=0), "it counts 0 empty documents, their parts 3"),
        (lambda c: c["sources"][0]["files"].update(read=5), "it counts 17 files of source in, their parts 18"),
        (lambda c: c["sources"][0]["files"]["not_read"].pop(), "it counts 17 files of source in, their parts 16"),
        (lambda c: c.pop("tokenizer"), r"\(tokenizer: Field required\)"),
        (lambda c: c.update(tokenizer=[1]), r"\(tokenizer: Input should be a valid"),
        (lambda c: c["splits"].pop("validation"), "validation is missing in `splits`"),
        (lambda c: c["splits"]["train"].update(documents=-1), r"\(splits.train.documents: "),
        (lambda c: c["splits"]["train"].update(tokens=10**40), "has the integer"),
        (lambda c: c["files"].pop("train.bin"), r"train\.bin is missing in `files`"),
        (lambda c: c["files"].pop("train.blocks"), r"train\.blocks is missing in `files`"),
        (lambda c: c["files"].update({"../x": c["files"]["train.bin"]}), r"\.\./x is no file of a data set"),
        (lambda c: c["files"]["train.idx"].update(sha256="x"), r"\(files\.train\.idx\.sha256: "),
        (lambda c: c.update(fingerprint="0" * 64), "its fingerprint is not that of its files"),
        (lambda c: c["tokenizer"].update(end_of_document_token=9), "the token that ends documents is outside"),
    ],
)
def test_entries_that_do_not_fit_together_are_refused_with_the_file(tmp_path: Path, change: Any, message: str) -> None:
    changed = content()
    change(changed)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, changed)
    assert str(caught.value).startswith(str(tmp_path / "manifest.json"))


def test_a_manifest_from_before_files_were_counted(tmp_path: Path) -> None:
    older = content()
    del older["documents_without_tokens"]
    for source in older["sources"]:
        source.pop("files", None)
        source.pop("empty_documents")
    assert summary(read(tmp_path, older))[4:-1] == ["  left out    3 empty documents"]
