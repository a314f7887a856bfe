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
from mlra_scale.data.sources import Source, SourceName, open_sources, texts_of
from mlra_scale.data.tally import Tally
from tests.unit.data.builders import packed, write_jsonl

TEXTS = ["first document\r\nwith two lines\n", "zweites: \u00e4 \u00f6 \u00fc \U0001f642", "", "x" * 5000]


def source_of(name: object, field: str = "text", split: str = "train") -> Source:
    (source,) = open_sources([SourceName(str(name), field, split)])
    return source


def read(*names: object, field: str = "text") -> list[str]:
    sources = open_sources([SourceName(str(name), field) for name in names])
    return [text for source in sources for text in texts_of(source)]


def tally_of(source: Source) -> Tally:
    tally = Tally()
    for place, portion in source.portions():
        tally.add(place.unit, len(list(portion.texts())), 0)
    return tally


def write_parquet(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=2)
    return path


ROWS = ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.json", "a.json.gz", "a.JSON.GZ", "a.jsonl.zst", "A.Jsonl.Zst"]


@pytest.mark.parametrize("name", [*ROWS, "a.parquet", "A.PARQUET"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_files_of_rows(tmp_path: Path, name: str, field: str) -> None:
    write = write_parquet if name.lower().endswith("parquet") else write_jsonl
    path = write(tmp_path / name, TEXTS, field)
    assert read(path, field=field) == read(tmp_path, field=field) == TEXTS
    source = source_of(path, field)
    consumed = sum(portion.consumed for _, portion in source.portions())
    assert consumed == source.total_bytes == path.stat().st_size
    assert list(texts_of(source)) == TEXTS  # and once more from the beginning


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS[0].encode() + TEXTS[1].encode())
    assert read(path) == [TEXTS[0] + TEXTS[1]]


def test_other_column_types_of_text(tmp_path: Path) -> None:
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).cast(kind)}), path)
        assert read(path) == TEXTS


def test_folders_and_globs_of_mixed_kinds(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    write_jsonl(tmp_path / "in" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "in" / "deep" / "c.jsonl.gz", ["c"])
    write_parquet(tmp_path / "in" / "d.parquet", ["d"])
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "readme.html").write_text("no")
    (tmp_path / "in" / ".hidden" / "e.txt").write_text("no")
    assert read(tmp_path / "in") == ["a", "b", "d", "c"]
    assert read(tmp_path / "in" / "*.jsonl") == ["b"]
    assert read(tmp_path / "in" / "**" / "*.jsonl*") == ["b", "c"]
    assert read(tmp_path / "i*") == ["a", "b", "d", "c"]
    assert read(tmp_path / "in" / "d.parquet", tmp_path / "in" / "a.txt") == ["d", "a"]
    assert [file.name for file in find_files(str(tmp_path / "in" / "deep"))[0]] == ["c.jsonl.gz"]
    # Every file that matched is read or named with the reason.
    source = source_of(tmp_path / "in")
    assert tally_of(source).documents == 4
    assert source.files(tally_of(source)) == file_counts(
        4,
        [],
        [
            NotRead(str(tmp_path / "in" / ".hidden"), "hidden"),
            NotRead(str(tmp_path / "in" / "readme.html"), "of no known kind"),
        ],
    )


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.txt.zst", "a.md", "a.md.gz"])
def test_every_way_to_write_text_with_and_without_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    content = TEXTS[1].encode() * 50_000  # several stretches, with characters across their borders
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(packed(name, mark + content))
        assert read(tmp_path / name) == [content.decode()]


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
            read(folder / "a.jsonl", other)
    with pytest.raises(DataError, match="named twice"):
        read(folder, f"{folder}/")
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
    source, tally = source_of(tmp_path), Tally()
    for place, portion in list(source.portions())[:3]:
        tally.add(place.unit, len(list(portion.texts())), 0)
    assert tally.documents == 3
    beyond = [NotRead(str(tmp_path / "d.jsonl"), "beyond --max-bytes")]
    assert source.files(tally) == file_counts(3, [str(tmp_path / "a.jsonl")], beyond)


def test_markdown_beside_data_is_a_note_and_text_of_its_own_is_read(tmp_path: Path) -> None:
    """A folder of a hub's data set has its card, README.md, beside the data."""
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "a.txt").write_text("text")
    assert [file.name for file in find_files(str(tmp_path))[0]] == ["README.md", "a.txt"]
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    files, not_read = find_files(str(tmp_path))
    assert [file.name for file in files] == ["a.txt", "b.jsonl"]
    assert not_read == [NotRead(str(tmp_path / "README.md"), "Markdown beside files of data; name it to have it read")]
    assert find_files(str(tmp_path / "README.md"))[0] == [tmp_path / "README.md"]


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.html").write_text("text")
    (tmp_path / "a.txt").write_text("text")
    for names, message in (
        ([tmp_path / "none.jsonl"], r"none.jsonl does not exist; a Hugging Face data set is written hf:NAME"),
        ([tmp_path / "*.jsonl"], "does not exist"),
        ([tmp_path / "empty"], "holds no file of a known kind"),
        ([tmp_path / "a.html"], "of no known kind"),
        ([tmp_path / "a.txt", tmp_path], "belongs to two sources"),
        (["python-docs", "python-docs"], "named twice"),
    ):
        with pytest.raises(DataError, match=message):
            read(*names)


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
        read(path)


def test_what_is_beside_the_text_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": NaN, "meta": {"text": "b"}, "n": 1, "n": 2}\r\n')
    assert read(path) == ["a"]


ARRAYS = {
    "one line": lambda rows: json.dumps(rows),
    "many lines": lambda rows: json.dumps(rows, indent=2),
    "a byte order mark and space": lambda rows: "\ufeff \r\n" + json.dumps(rows) + "\n\n",
    "objects over several lines": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "objects behind each other": lambda rows: "".join(json.dumps(row, indent=1) for row in rows),
    "lines behind a blank one": lambda rows: "\n \n" + "\n".join(map(json.dumps, rows)),
}


@pytest.mark.parametrize(
    ("layout", "ending"),
    [*((layout, "json") for layout in ARRAYS), ("one line", "json.gz"), ("many lines", "JSON.ZST")],
)
def test_json_that_is_not_in_lines(tmp_path: Path, layout: str, ending: str) -> None:
    # Several portions, one of a single document.
    rows = [{"id": i, "body": text} for i, text in enumerate([*TEXTS, "\u00e4 \\" * 300_000, *TEXTS * 300])]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(packed(path.name, ARRAYS[layout](rows).encode()))
    source = source_of(path, "body")
    portions = [portion for _, portion in source.portions()]
    assert [text for portion in portions for text in portion.texts()] == [row["body"] for row in rows]
    assert sum(portion.consumed for portion in portions) == path.stat().st_size and len(portions) > 3


@pytest.mark.parametrize("content", ["", " \n\n", "[]", "[ \n ]\n"])
def test_json_without_any_document(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read(tmp_path) == []


BAD_JSON = {
    '[{"text": "a"},\n{"text": "b"} {"text": "c"}]': "line 2: not JSON \\(',' or '\\]' is missing",
    '[{"text": "a"},\n\n]': "line 3: not JSON \\(there is nothing behind ','",
    '[{"text": "a"},\n"b"]': "line 2: a JSON object is wanted, this is str",
    '[{"text": "a"},\n{"body": "b"}]': r"line 2: there is no field 'text' \(fields: body\)",
    '[{"text": "a"},\n{"text": "b", "text": "c"}]': "line 2: there are several fields 'text'",
    '[{"text": "a"}\n': "line 2: not JSON \\(',' or '\\]' is missing",
    '[{"text": "a"},\n': "line 2: not JSON \\(Expecting value",
    '[{"text": "a"}]\n[]': "line 2: not JSON \\(there is more behind the end of the array",
    '[{"text": "a"},\n{"text": "cut': "line 2: not JSON \\(Unterminated string",
    '{"text":\n"a\nb"}': "line 2: not JSON \\(Invalid control character",
    '{\n"text": "a",\n': "line 3: not JSON \\(Expecting property name",
    "nonsense": "line 1: not JSON \\(Expecting value",
    "[" * 100_000: "line 1: not JSON",
    '[{"text": ' + "9" * 5000 + "}]": "line 1: not JSON",
}


@pytest.mark.parametrize("content", BAD_JSON, ids=range(len(BAD_JSON)))
def test_json_that_is_damaged_is_refused_with_the_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=rf"a\.json, {BAD_JSON[content]}"):
        read(tmp_path)
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"},\n{"text": "\xff"}]')
    with pytest.raises(DataError, match=r"a\.json, line 2: not UTF-8 text"):
        read(tmp_path)


def test_json_lines_that_are_an_array_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[{"text": "a"}]')
    with pytest.raises(DataError, match=r"this is list; a file that is one array has to be named \.json"):
        read(tmp_path)


def test_every_source_has_a_field_of_its_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_parquet(tmp_path / "b.parquet", ["b"], "body")
    named = [SourceName(str(tmp_path / "a.jsonl")), SourceName(str(tmp_path / "b.parquet"), "body")]
    assert [text for source in open_sources(named) for text in texts_of(source)] == ["a", "b"]


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_source_continues_after_any_place(tmp_path: Path, prefix: str) -> None:
    for name, count in (("a", 3000), ("b", 0), ("c", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i} " + "x" * 300 for i in range(count)])
    source = source_of(f"{prefix}{tmp_path}")
    whole = list(source.portions())
    places = [place for place, _ in whole]
    assert len(places) == len(set(places)) > 4 and places == sorted(places)
    for index in {0, 1, len(whole) // 2, len(whole) - 1}:
        assert list(source.portions(places[index])) == whole[index + 1 :]


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    states = {source_of(tmp_path).state, source_of(f"hf:{tmp_path}").state}
    for change in (
        lambda: os.utime(path, ns=(0, 0)),
        lambda: path.write_bytes(path.read_bytes() + b"\n"),
        lambda: write_jsonl(tmp_path / "b.jsonl", ["b"]),
    ):
        change()
        for name in (tmp_path, f"hf:{tmp_path}"):
            assert source_of(name).state == source_of(name).state not in states
            states.add(source_of(name).state)


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
        read(tmp_path / "a.parquet")


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
            read(path, field=field)
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
            read(tmp_path / name)
    double = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(double, tmp_path / "double.parquet")
    with pytest.raises(DataError, match=r"double.parquet has several columns 'text'"):
        read(tmp_path / "double.parquet")
    table.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        read(table)


def test_a_file_that_vanishes_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    source = source_of(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
        list(source.portions())


def test_hugging_face_data_sets_are_streamed(tmp_path: Path) -> None:
    # A local folder in the hub's form goes through the same load_dataset(..., streaming=True).
    (tmp_path / "set" / "data").mkdir(parents=True)
    write_jsonl(tmp_path / "set" / "data" / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "set" / "data" / "test.jsonl", ["tested"])
    name = f"hf:{tmp_path / 'set'}"
    assert read(name) == TEXTS
    source = source_of(name, split="test")
    assert list(texts_of(source)) == ["tested"] and "split test" in source.name
    for other in (tmp_path, tmp_path / "set" / "data" / "*"):
        with pytest.raises(DataError, match=r"jsonl belongs to two sources, hf:.* and "):
            read(other, name)
    reason = "not in this split as the datasets library sees the folder"
    others = [NotRead(str(tmp_path / "set" / "data" / "train.jsonl"), reason)]
    assert source.files(tally_of(source)) == file_counts(1, (), others)
    for wanted, field, split, message in (
        (name, "body", "train", r"row 1: there is no field 'body' \(fields: id, text\)"),
        (name, "id", "train", "row 1: field 'id' is int"),
        (name, "text", "dev", "cannot be read: .*dev"),
        (f"{name}-none", "text", "train", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            list(source_of(wanted, field, split).portions())
