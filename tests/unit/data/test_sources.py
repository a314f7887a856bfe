"""Sources: every kind of input gives its texts, and every defect is an error with file and line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mlra_scale.data import DataError
from mlra_scale.data.files import NotRead, file_counts, find_files
from mlra_scale.data.sources import open_sources
from tests.unit.data.builders import packed, write_jsonl

TEXTS = ["first document\r\nwith two lines\n", "zweites: \u00e4 \u00f6 \u00fc \U0001f642", "", "x" * 5000]


def texts_of(*names: object, field: str = "text") -> list[str]:
    return [
        d.text for source in open_sources([str(n) for n in names], field, "train", None) for d in source.documents()
    ]


def write_parquet(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=2)
    return path


ROWS = ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.json", "a.json.gz", "a.JSON.GZ", "a.jsonl.zst", "A.Jsonl.Zst"]


@pytest.mark.parametrize("name", [*ROWS, "a.parquet", "A.PARQUET"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_files_of_rows(tmp_path: Path, name: str, field: str) -> None:
    write = write_parquet if name.lower().endswith("parquet") else write_jsonl
    path = write(tmp_path / name, TEXTS, field)
    assert texts_of(path, field=field) == texts_of(tmp_path, field=field) == TEXTS
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
    assert [file.name for file in find_files(str(tmp_path / "in" / "deep"))[0]] == ["c.jsonl.gz"]
    # Every file that matched is read or named with the reason.
    (source,) = open_sources([str(tmp_path / "in")], "text", "train", None)
    assert len(list(source.documents())) == 4
    assert source.files() == file_counts(
        4,
        [],
        [
            NotRead(str(tmp_path / "in" / ".hidden"), "hidden"),
            NotRead(str(tmp_path / "in" / "readme.md"), "of no known kind"),
        ],
    )


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.txt.zst"])
def test_every_way_to_write_text_with_and_without_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    content = TEXTS[1].encode() * 50_000  # several stretches, with characters across their borders
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(packed(name, mark + content))
        assert texts_of(tmp_path / name) == [content.decode()]


def test_links_fifos_and_loops(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ["a"])
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    os.link(folder / "a.jsonl", folder / "c.jsonl")
    for link in ("loop", "ring"):  # the standard library's ** goes around both, 2^40 times
        (folder / "deep" / link).symlink_to(folder)
    os.mkfifo(folder / "d.jsonl")  # opening it would wait for a writer for ever
    (tmp_path / "elsewhere").symlink_to(folder)
    for name in (folder, folder / "**", folder / "**" / "*", folder / "**" / "*.jsonl"):
        files, not_read = find_files(str(name))
        assert files == [folder / "a.jsonl"]
        assert not_read == [
            NotRead(str(folder / "b.jsonl"), "the same file under a second name"),
            NotRead(str(folder / "c.jsonl"), "the same file under a second name"),
            NotRead(str(folder / "d.jsonl"), "not a regular file"),
            NotRead(str(folder / "deep" / "loop"), "a link to a folder"),
            NotRead(str(folder / "deep" / "ring"), "a link to a folder"),
        ]
    assert find_files(str(tmp_path / "else*"))[0] == [tmp_path / "elsewhere" / "a.jsonl"]
    for other in (tmp_path / "elsewhere", folder / "c.jsonl", folder / "b.jsonl"):
        with pytest.raises(DataError, match="belongs to two sources"):
            texts_of(folder / "a.jsonl", other)
    with pytest.raises(DataError, match="named twice"):
        texts_of(folder, f"{folder}/")
    (folder / "e.jsonl").symlink_to(folder / "gone")
    with pytest.raises(DataError, match=r"e\.jsonl cannot be read: No such file"):
        find_files(str(folder))


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path: str) -> object:  # root, whom tests may run as, can list every folder
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for name in (tmp_path, tmp_path / "**" / "*.jsonl"):
        with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
            find_files(str(name))


def test_files_without_documents_and_beyond_the_end_are_counted(tmp_path: Path) -> None:
    for name, texts in (("a", []), ("b", ["1", "2"]), ("c", ["3"]), ("d", ["4"])):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    (source,) = open_sources([str(tmp_path)], "text", "train", None)
    stream = source.documents()
    assert [next(stream).text for _ in range(3)] == ["1", "2", "3"]
    beyond = [NotRead(str(tmp_path / "d.jsonl"), "beyond --max-bytes")]
    assert source.files() == file_counts(3, [str(tmp_path / "a.jsonl")], beyond)


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
    b'{"text": "one", "text": "two"}': "line 3: there are several fields 'text'",
    b"[" * 100_000: "line 3: not JSON",
}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_bad_lines_are_refused_with_file_and_line(tmp_path: Path, line: bytes, suffix: str) -> None:
    content = b'\xef\xbb\xbf{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n'
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(packed(suffix, content))
    with pytest.raises(DataError, match=rf"bad\.{suffix}, {LINES[line]}"):
        texts_of(path)


def test_what_is_beside_the_text_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": NaN, "meta": {"text": "b"}, "n": 1, "n": 2}\r\n')
    assert texts_of(path) == ["a"]


def test_json_that_is_not_in_lines_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, message in (
        (json.dumps([{"text": "a"}]), "line 1: a JSON object is wanted, this is list; write every document as"),
        (json.dumps({"text": "a"}, indent=2), "line 1: not JSON .*; every line must hold one JSON object"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"a\.json, {message}"):
            texts_of(tmp_path)


@pytest.mark.parametrize("kind", ["plain", "large", "view", "dictionary"])
def test_parquet_text_that_is_not_utf_8(tmp_path: Path, kind: str) -> None:
    types = {"plain": pyarrow.string(), "large": pyarrow.large_string(), "view": pyarrow.string_view()}
    rows = [f"row {i}".encode() for i in range(300)] + [b"bad \xff\xfe bytes"]
    binary = {"large": pyarrow.large_binary(), "view": pyarrow.binary_view()}.get(kind, pyarrow.binary())
    column = pyarrow.array(rows, binary).view(types.get(kind, pyarrow.string()))
    if kind == "dictionary":
        column = column.dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 301: not UTF-8 text"):
        texts_of(tmp_path / "a.parquet")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    text, table, cut, foreign = (tmp_path / name for name in ("a.txt", "a.parquet", "a.jsonl.gz", "b.jsonl.gz"))
    text.write_bytes(b"one\ntwo\n\xff\n")
    write_parquet(table, ["a", None])
    write_jsonl(cut, [str(i) for i in range(5000)])
    cut.write_bytes(cut.read_bytes()[:500])
    foreign.write_bytes(b"not gzip")
    for path, field, message in (
        (text, "text", "a.txt, line 3: not UTF-8"),
        (table, "text", r"a.parquet, row 2: field 'text' is NoneType"),
        (table, "body", r"a.parquet has no column 'body' \(it has: id, text\); choose with --field"),
        (table, "id", "a.parquet, row 1: field 'id' is int"),
        (cut, "text", "a.jsonl.gz cannot be read"),
        (foreign, "text", "b.jsonl.gz cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            texts_of(path, field=field)
    whole = packed("c.zst", b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(5000)))
    for name, content, message in (
        ("c.jsonl.zst", whole[:500], "Truncated compressed stream"),
        ("c.jsonl.zst", b"(\xb5/\xfd", "Truncated compressed stream"),
        ("c.jsonl.zst", whole + b"more", "decompress failed"),
        ("c.txt.gz", gzip.compress(b"text")[:-3], "Compressed file ended before"),
        ("c.parquet", b"", "file size is 0 bytes"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read.*: .*{message}"):
            texts_of(tmp_path / name)
    double = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(double, tmp_path / "double.parquet")
    with pytest.raises(DataError, match=r"double.parquet has several columns 'text'"):
        texts_of(tmp_path / "double.parquet")
    table.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        texts_of(table)


def test_a_file_that_vanishes_is_an_error(tmp_path: Path) -> None:
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
    for other in (tmp_path, tmp_path / "set" / "data" / "*"):
        with pytest.raises(DataError, match=r"jsonl belongs to two sources, hf:.* and "):
            texts_of(other, name)
    reason = "not in this split as the datasets library sees the folder"
    others = [NotRead(str(tmp_path / "set" / "data" / "train.jsonl"), reason)]
    assert source.files() == file_counts(1, (), others)
    for wanted, field, split, message in (
        (name, "body", "train", r"row 1: there is no field 'body' \(fields: id, text\)"),
        (name, "id", "train", "row 1: field 'id' is int"),
        (name, "text", "dev", "cannot be read: .*dev"),
        (f"{name}-none", "text", "train", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            list(open_sources([wanted], field, split, None)[0].documents())
