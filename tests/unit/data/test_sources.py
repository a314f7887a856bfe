"""Sources: every kind of input gives its texts, and every defect is told with file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mlra_scale.data.errors import DataError
from mlra_scale.data.sources import find_files, open_sources

TEXTS = ["first document\r\nwith two lines\n", "zweites: \u00e4 \u00f6 \u00fc \U0001f642", "", "x" * 5000]


def texts_of(*names: object, field: str = "text") -> list[str]:
    return [
        d.text for source in open_sources([str(n) for n in names], field, "train", None) for d in source.documents()
    ]


def write_jsonl(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    content = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_files_of_rows(tmp_path: Path, name: str, field: str) -> None:
    write = write_parquet if name.endswith("parquet") else write_jsonl
    path = write(tmp_path / name, TEXTS, field)
    assert texts_of(path, field=field) == TEXTS
    (source,) = open_sources([str(path)], field, "train", None)
    consumed = sum(document.consumed for document in source.documents())
    assert consumed == source.total_bytes == path.stat().st_size
    assert [d.text for d in source.documents()] == TEXTS  # and once more from the beginning


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS[0].encode() + TEXTS[1].encode())
    assert texts_of(path) == [TEXTS[0] + TEXTS[1]]


def test_other_column_types_of_text(tmp_path: Path) -> None:
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).cast(kind)}), path)
        assert texts_of(path) == TEXTS


def test_folders_and_globs_of_mixed_kinds(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    write_jsonl(tmp_path / "in" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "in" / "deep" / "c.jsonl.gz", ["c"])
    write_parquet(tmp_path / "in" / "d.parquet", ["d"])
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "readme.md").write_text("no")
    (tmp_path / "in" / ".hidden" / "e.txt").write_text("no")
    assert texts_of(tmp_path / "in") == ["a", "b", "d", "c"]
    assert texts_of(tmp_path / "in" / "*.jsonl") == ["b"]
    assert texts_of(tmp_path / "in" / "**" / "*.jsonl*") == ["b", "c"]
    assert texts_of(tmp_path / "i*") == ["a", "b", "d", "c"]
    assert texts_of(tmp_path / "in" / "d.parquet", tmp_path / "in" / "a.txt") == ["d", "a"]
    assert [file.name for file in find_files(str(tmp_path / "in" / "deep"))] == ["c.jsonl.gz"]


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "a.txt").write_text("text")
    for names, message in (
        ([tmp_path / "none.jsonl"], r"none.jsonl does not exist; a Hugging Face data set is written hf:NAME"),
        ([tmp_path / "*.jsonl"], "does not exist"),
        ([tmp_path / "empty"], "holds no file of a known kind"),
        ([tmp_path / "a.md"], "of no known kind"),
        ([tmp_path / "a.txt", tmp_path], "belongs to two sources"),
        (["python-docs", "python-docs"], "named twice"),
    ):
        with pytest.raises(DataError, match=message):
            texts_of(*names)


LINES = {
    b"{'text': 1}": "line 3: not JSON",
    b'{"text": "cut': "line 3: not JSON",
    b'["text"]': "line 3: a JSON object is wanted, this is list",
    b'{"body": "b", "id": 1}': r"line 3: there is no field 'text' \(fields: body, id\); choose with --field",
    b'{"text": null}': "line 3: field 'text' is NoneType, not text",
    b'{"text": 7}': "line 3: field 'text' is int, not text",
    b'{"text": "\\ud800"}': "line 3: field 'text' holds half of a surrogate pair",
    b'{"text": "\xff"}': "line 3: not UTF-8 text",
}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("line", LINES)
def test_bad_lines_are_told_with_file_and_line(tmp_path: Path, line: bytes, suffix: str) -> None:
    content = b'\xef\xbb\xbf{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n'
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"bad\.{suffix}, {LINES[line]}"):
        texts_of(path)


def test_bad_files_are_told(tmp_path: Path) -> None:
    text, table, packed, foreign = (tmp_path / name for name in ("a.txt", "a.parquet", "a.jsonl.gz", "b.jsonl.gz"))
    text.write_bytes(b"one\ntwo\n\xff\n")
    write_parquet(table, ["a", None])
    write_jsonl(packed, [str(i) for i in range(5000)])
    packed.write_bytes(packed.read_bytes()[:500])
    foreign.write_bytes(b"not gzip")
    for path, field, message in (
        (text, "text", "a.txt, line 3: not UTF-8"),
        (table, "text", r"a.parquet, row 2: field 'text' is NoneType"),
        (table, "body", r"a.parquet has no column 'body' \(it has: id, text\); choose with --field"),
        (table, "id", "a.parquet, row 1: field 'id' is int"),
        (packed, "text", "a.jsonl.gz cannot be read"),
        (foreign, "text", "b.jsonl.gz cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            texts_of(path, field=field)
    table.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        texts_of(table)


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (source,) = open_sources([str(path)], "text", "train", None)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
        list(source.documents())


def test_hugging_face_data_sets_are_streamed(tmp_path: Path) -> None:
    # A local folder in the hub's form goes through the same load_dataset(..., streaming=True).
    (tmp_path / "set" / "data").mkdir(parents=True)
    write_jsonl(tmp_path / "set" / "data" / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "set" / "data" / "test.jsonl", ["tested"])
    name = f"hf:{tmp_path / 'set'}"
    assert texts_of(name) == TEXTS
    (source,) = open_sources([name], "text", "test", None)
    assert [d.text for d in source.documents()] == ["tested"] and "split test" in source.name
    for wanted, field, split, message in (
        (name, "body", "train", r"row 1: there is no field 'body' \(fields: id, text\)"),
        (name, "id", "train", "row 1: field 'id' is int"),
        (name, "text", "dev", "cannot be read: .*dev"),
        (f"{name}-none", "text", "train", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            list(open_sources([wanted], field, split, None)[0].documents())
