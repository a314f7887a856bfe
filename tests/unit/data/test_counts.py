"""The counts of a manifest: every file is read or named, and the numbers add up."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest

from mlra_scale.data.counts import count_lines, find_contradiction, source_entry
from mlra_scale.data.files import FileCounts, NotRead


def content() -> dict[str, Any]:
    not_read = [NotRead(f"in/{i}.md", "of no known kind") for i in range(12)] + [NotRead("in/.git", "hidden")]
    return {
        "documents": 9,
        "empty_documents_left_out": 3,
        "documents_without_tokens": 2,
        "sources": [
            source_entry("in", "files", 7, 2, FileCounts(4, ["in/a.jsonl"], not_read)),
            source_entry("hf:x (split train)", "hugging-face", 2, 1, None),
        ],
    }


def test_an_entry_has_every_number_and_the_first_names() -> None:
    files = content()["sources"][0]["files"]
    assert (files["matched"], files["read"]) == (17, 4)
    assert files["without_documents"] == {"files": 1, "names": ["in/a.jsonl"]}
    assert [(group["reason"], group["files"], len(group["names"])) for group in files["not_read"]] == [
        ("of no known kind", 12, 10),
        ("hidden", 1, 1),
    ]
    assert find_contradiction(content()) is None


def test_the_lines_of_a_summary() -> None:
    assert count_lines(content()) == [
        "  files       4 of 17 read of in",
        "  not read    12 of no known kind: in/0.md, in/1.md, in/2.md and 9 more",
        "  not read    1 hidden: in/.git",
        "  note        1 read without any document: in/a.jsonl",
        "  left out    3 empty documents",
        "  note        2 documents have text of which this tokenizer makes no token but the end's",
    ]


def test_names_that_are_no_text_can_be_printed() -> None:
    odd = content()
    odd["sources"][0]["name"] = os.fsdecode(b"caf\xe9 \x1b[31m \xc3\xa4")
    assert count_lines(odd)[0] == "  files       4 of 17 read of caf\\udce9 \\x1b[31m \u00e4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(documents=10), "it counts 10 documents, their parts 9"),
        (lambda c: c.update(empty_documents_left_out=0), "it counts 0 empty documents, their parts 3"),
        (lambda c: c["sources"][0]["files"].update(read=5), "it counts 17 files of source in, their parts 18"),
        (lambda c: c["sources"][0]["files"]["not_read"].pop(), "it counts 17 files of source in, their parts 16"),
    ],
)
def test_numbers_that_do_not_add_up(change: Any, message: str) -> None:
    changed = content()
    change(changed)
    assert find_contradiction(changed) == message


def test_a_manifest_from_before_files_were_counted() -> None:
    older = copy.deepcopy(content())
    del older["documents_without_tokens"]
    for source in older["sources"]:
        source.pop("files", None)
        source.pop("empty_documents")
    assert find_contradiction(older) is None and count_lines(older) == ["  left out    3 empty documents"]
