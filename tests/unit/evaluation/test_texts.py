"""Texts and prepared data become documents: tokens, words and bytes of what is there, in pieces or not."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers

from mlra_scale.data import DataError
from mlra_scale.data.tokenizer import LoadedTokenizer, load_tokenizer, train_bpe
from mlra_scale.evaluation import texts
from mlra_scale.evaluation.perplexity import Document, Piece
from mlra_scale.evaluation.texts import PieceEncoder, documents_of_data, documents_of_sources, joined
from tests.support.gpt2_folders import TEXT, tokenizer
from tests.unit.checkpoint.builders import flip_a_byte
from tests.unit.data.builders import prepare_texts

VERSION_1 = Path(__file__).resolve().parents[2] / "fixtures" / "written_by_3a017c2" / "data"


def gathered(documents: Iterable[Document]) -> list[Piece]:
    """One piece for each document."""
    found = []
    for document in documents:
        pieces = list(document)
        tokens = [token for piece in pieces for token in piece.tokens]
        found.append(Piece(tokens, sum(p.num_words for p in pieces), sum(p.num_bytes for p in pieces)))
    return found


def expected(text: str) -> Piece:
    return Piece(tokenizer().tokenizer.encode(text).ids, len(text.split()), len(text.encode()))


@given(text=st.text(alphabet="ab \n\t\u00e9\u2003'1.\x85\x1c", max_size=60), stretches=st.integers(1, 7))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(text: str, stretches: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_PIECE_BYTES", 8)
        cut = [text[place : place + stretches] for place in range(0, len(text), stretches)]
        assert gathered([texts.pieces(cut, PieceEncoder(tokenizer()))]) == [expected(text)]


def test_files_lines_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE_BYTES", 64)
    story = TEXT.replace("tokens", "t\u00f6k\u00ebns \U0001f600") * 3
    (tmp_path / "a.txt").write_bytes(("\r\n" + story).encode())
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    (tmp_path / "c.txt").write_text("")
    encoder = PieceEncoder(tokenizer())
    assert len(list(next(documents_of_sources([str(tmp_path / "a.txt")], encoder)))) > 5
    (tmp_path / "d.csv").write_text("of no known kind")
    notes: list[str] = []
    list(documents_of_sources([str(tmp_path)], PieceEncoder(tokenizer(), 0), note=notes.append))
    assert notes == [f"{tmp_path}: 1 not read, of no known kind: {tmp_path / 'd.csv'}"]
    assert gathered(documents_of_sources([str(tmp_path)], encoder)) == [
        expected("\r\n" + story),
        *map(expected, TEXT.splitlines()),
        Piece([], 0, 0),
    ]
    assert len(gathered(documents_of_sources(["python-docs"], PieceEncoder(tokenizer(), 500)))) >= 1


@pytest.mark.parametrize("limit", [1, 10, 57, 100, 10_000])
def test_a_limit_ends_the_texts_and_counts_what_was_taken(tmp_path: Path, limit: int) -> None:
    lines = [line + "\n" for line in TEXT.splitlines()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    found = gathered(documents_of_sources([str(tmp_path / "a.jsonl")], PieceEncoder(tokenizer(), limit)))
    whole = [expected(line) for line in lines]
    tokens = [token for piece in whole for token in piece.tokens]
    assert [token for piece in found for token in piece.tokens] == tokens[:limit]
    assert found[:-1] == whole[: len(found) - 1]
    last = tokenizer().tokenizer.decode(list(found[-1].tokens))
    assert found[-1] == Piece(found[-1].tokens, len(last.split()), len(last.encode()))


def test_text_is_text(tmp_path: Path) -> None:
    """What looks like a special token is none."""
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    (found,) = gathered(documents_of_sources([str(tmp_path / "a.txt")], PieceEncoder(tokenizer())))
    assert tokenizer().end_of_document_token not in found.tokens and found.num_bytes == 15


@pytest.mark.parametrize("kind", ["not split", "a space before", "words of its own", "lower case"])
def test_tokenizers_that_see_beyond_white_space_are_given_whole_texts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_PIECE_BYTES", 8)
    own = Tokenizer.from_str(train_bpe([TEXT], 280).tokenizer.to_str())
    if kind == "words of its own":
        own.add_tokens(["window slides", "two thin matrices"])
    elif kind == "a space before":
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "lower case":
        own.normalizer = normalizers.Lowercase()
    else:
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        own.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    encoder = PieceEncoder(LoadedTokenizer(own, "test", "test", "<|endoftext|>"))
    assert not encoder.can_cut and PieceEncoder(tokenizer()).can_cut
    cut = [TEXT[first : first + 7].replace(" in", "\nin") for first in range(0, len(TEXT), 7)]
    (piece,) = texts.pieces(cut, encoder)
    assert piece.tokens == own.encode("".join(cut)).ids


def test_bytes_that_are_no_text_are_told_with_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE_BYTES", 7)
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree \xff\n")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xc3")
    for name, line in (("a.txt", 3), ("b.txt", 2)):
        with pytest.raises(DataError, match=f"{name}, line {line}: not UTF-8 text"):
            gathered(documents_of_sources([str(tmp_path / name)], PieceEncoder(tokenizer())))
    with pytest.raises(DataError, match="does not exist"):
        gathered(documents_of_sources([str(tmp_path / "c.txt")], PieceEncoder(tokenizer())))


LINES = [f"{line} \u00e9{number}" for number in range(8) for line in TEXT.splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    return prepare_texts(folder, LINES, train_bpe=300, validation_fraction=0.25, workers=1)


def test_prepared_data_are_the_texts_that_they_were_made_of(prepared: Path) -> None:
    loaded = load_tokenizer([str(prepared / "tokenizer")])
    found = {}
    for split in ("train", "validation"):
        for piece in gathered(documents_of_data(prepared, split, PieceEncoder(loaded), loaded)):
            text = loaded.tokenizer.decode(list(piece.tokens))
            assert piece == Piece(loaded.tokenizer.encode(text).ids, len(text.split()), len(text.encode()))
            found[text] = split
    assert sorted(found) == sorted(LINES) and set(found.values()) == {"train", "validation"}


@pytest.mark.parametrize("whole_bytes", [0, 64_000_000])
def test_damaged_data_are_not_evaluated(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr("mlra_scale.data.indexed.WHOLE_BYTES", whole_bytes)
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    loaded = load_tokenizer([str(data / "tokenizer")])
    flip_a_byte(data / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin is damaged: .* at offset 0"):
        gathered(documents_of_data(data, "train", PieceEncoder(loaded), loaded))


def test_data_of_an_earlier_version_are_read_with_one_line_of_notice(prepared: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(VERSION_1, tmp_path / "old"))
    for data, words in ((old, [f"{old} was prepared by an earlier version"]), (prepared, [])):
        loaded, notes = load_tokenizer([str(data / "tokenizer")]), list[str]()
        assert gathered(documents_of_data(data, "validation", PieceEncoder(loaded), loaded, notes.append))
        assert [note.partition(":")[0] for note in notes] == words


def test_joined_documents_keep_their_ends(prepared: Path) -> None:
    loaded = load_tokenizer([str(prepared / "tokenizer")])
    apart = gathered(documents_of_data(prepared, "validation", PieceEncoder(loaded), loaded))
    end = loaded.end_of_document_token
    (whole,) = gathered([joined(documents_of_data(prepared, "validation", PieceEncoder(loaded), loaded), end)])
    assert whole.tokens == [token for piece in apart for token in (*piece.tokens, end)]
    assert whole.num_bytes == sum(piece.num_bytes for piece in apart)


def test_prepared_data_of_other_tokenizers_and_splits_are_refused(prepared: Path) -> None:
    loaded = load_tokenizer([str(prepared / "tokenizer")])
    for split, own, message in (
        ("test", loaded, "no split 'test'; it has train and validation"),
        ("train", tokenizer(), "was made with another tokenizer"),
    ):
        with pytest.raises(DataError, match=message):
            gathered(documents_of_data(prepared, split, PieceEncoder(own), own))
