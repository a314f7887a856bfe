"""Tokenizers: real GPT-2 files, every way to name one, exact round trips, and one checksum for one tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from mlra_scale.data import DataError
from mlra_scale.data.encode import Encoder, Placed
from mlra_scale.data.readers import Texts
from mlra_scale.data.tally import Place
from mlra_scale.data.tokenizer import (
    LoadedTokenizer,
    load_tokenizer,
    names_its_end,
    save_tokenizer,
    tokenizer_sha256,
    train_bpe,
)
from tests.support.foreign_tokenizers import begins_with_bos, save
from tests.unit.data.builders import gpt2_files

TEXTS = [
    "Hello world",
    " leading\r\n\ttabs  and   spaces \n\n",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642 \x00\x7f \u2028",
    "x = {'a': [1, 2]}  # note",
]


@pytest.fixture(scope="module")
def gpt2() -> LoadedTokenizer:
    return load_tokenizer([str(gpt2_files())])


@pytest.fixture(scope="module")
def trained() -> LoadedTokenizer:
    return train_bpe(["the cat sat on the mat and the dog sat on the log"] * 50, 290)


def test_the_real_gpt2_files(gpt2: LoadedTokenizer) -> None:
    assert gpt2.tokenizer.encode("Hello world").ids == [15496, 995]
    assert (gpt2.vocabulary_size, gpt2.end_of_document, gpt2.end_of_document_token) == (50257, "<|endoftext|>", 50256)


def test_every_way_to_name_the_gpt2_files(gpt2: LoadedTokenizer, tmp_path: Path) -> None:
    vocabulary = shutil.copy(gpt2_files() / "encoder.json", tmp_path / "vocab.json")
    merges = shutil.copy(gpt2_files() / "vocab.bpe", tmp_path / "merges.txt")
    checksum = tokenizer_sha256(gpt2.tokenizer)
    for names in ([str(tmp_path)], [str(vocabulary), str(merges)], [str(merges), str(vocabulary)]):
        loaded = load_tokenizer(names)
        assert loaded.kind == "gpt2-files" and tokenizer_sha256(loaded.tokenizer) == checksum


@pytest.mark.parametrize("which", ["gpt2", "trained"])
def test_saved_beside_the_data_it_is_the_same_tokenizer(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    loaded: LoadedTokenizer = request.getfixturevalue(which)
    folder = tmp_path / "tokenizer"
    save_tokenizer(loaded, folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == loaded.vocabulary_size and theirs.eos_token_id == loaded.end_of_document_token
    for text in TEXTS:
        ids = loaded.tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    checksum = tokenizer_sha256(loaded.tokenizer)
    if which == "gpt2":  # the real files take their time; what follows is the same for both
        assert tokenizer_sha256(load_tokenizer([str(folder)]).tokenizer) == checksum
        return
    copies = [load_tokenizer([str(folder)]), load_tokenizer([str(folder / "tokenizer.json")])]
    copies.append(load_tokenizer([str(folder / "vocab.json"), str(folder / "merges.txt")]))
    assert [copy.kind for copy in copies] == ["hugging-face", "tokenizer.json", "gpt2-files"]
    for copy in copies:
        assert tokenizer_sha256(copy.tokenizer) == checksum
        assert copy.end_of_document_token == loaded.end_of_document_token
    # And once more through the Hugging Face object.
    again = tmp_path / "again"
    save_tokenizer(copies[0], again)
    assert tokenizer_sha256(load_tokenizer([str(again)]).tokenizer) == checksum


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_round_trips_are_exact(trained: LoadedTokenizer, text: str) -> None:
    ids = trained.tokenizer.encode(text).ids
    assert trained.tokenizer.decode(ids, skip_special_tokens=False) == text


END = "<|endoftext|>"


def bare(model: str) -> Tokenizer:
    """A tokenizer of another library, without special tokens of its own."""
    if model == "words":
        return Tokenizer(models.WordLevel({"<unk>": 0, "document": 1}, unk_token="<unk>"))
    tokenizer = Tokenizer(models.BPE() if model == "bytes" else models.Unigram())
    corpus = [f"document {i} of gradient norms and deep layers {END}" for i in range(60)]
    if model == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def ends_of(path: Path, end: str | None = None) -> int:
    """Prepares 40 documents that spell the end token, in two cases; returns how many end tokens come out."""
    loaded = load_tokenizer([str(path)], end)
    encoder = Encoder(loaded.tokenizer.to_str(), loaded.end_of_document_token, "int32")
    spelled = f"{loaded.end_of_document} {loaded.end_of_document.upper()}"
    chunk = encoder([Placed(0, Place(0, 0), Texts([f"document {i} {spelled} " for i in range(40)], 1))])
    assert tokenizer_sha256(loaded.tokenizer) == tokenizer_sha256(Tokenizer.from_file(str(path)))
    return int((chunk.tokens == loaded.end_of_document_token).sum())


@pytest.mark.parametrize("lowers", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("model", ["bytes", "words", "pieces"])
def test_a_document_has_one_end_whatever_it_spells(
    tmp_path: Path, model: str, special: bool, normalized: bool, lowers: bool
) -> None:
    tokenizer, path = bare(model), tmp_path / "tokenizer.json"
    if lowers:
        tokenizer.normalizer = normalizers.Lowercase()
    if model == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    token = AddedToken(END, special=special, normalized=normalized)
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(str(path))
    assert ends_of(path) == 40


@pytest.mark.parametrize("case", ["a word", "a piece", "the unknown word"])
def test_an_end_that_text_can_give_is_refused(tmp_path: Path, case: str) -> None:
    """Tokens of the plain vocabulary: no setting keeps text from becoming them."""
    path = tmp_path / "tokenizer.json"
    if case == "a piece":
        tokenizer, end = bare("bytes"), "e"
    else:
        unknown = END if case == "the unknown word" else "<unk>"
        tokenizer, end = Tokenizer(models.WordLevel({unknown: 0, "document": 1, END: 2}, unk_token=unknown)), END
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    with pytest.raises(DataError, match=r"is to end documents, but .*begins with 'document 0 .*--end-of-document"):
        ends_of(path, end)


def test_training_gives_the_asked_size_and_the_same_tokens_again(trained: LoadedTokenizer) -> None:
    texts = [f"word{i % 97} and number {i * i % 1009}" for i in range(500)]
    checksums = {tokenizer_sha256(train_bpe(texts, 400).tokenizer) for _ in range(3)}
    assert len(checksums) == 1 and train_bpe(texts, 400).vocabulary_size == 400
    assert trained.end_of_document_token == 0 and checksums != {tokenizer_sha256(trained.tokenizer)}
    with pytest.raises(DataError, match="need 257 tokens"):
        train_bpe(texts, 256)


def test_the_checksum_sees_what_changes_tokens_only(trained: LoadedTokenizer, tmp_path: Path) -> None:
    content = json.loads(trained.tokenizer.to_str())

    def checksum(change: dict) -> str:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content | change))
        return tokenizer_sha256(load_tokenizer([str(path)]).tokenizer)

    same = tokenizer_sha256(trained.tokenizer)
    assert checksum({}) == same
    assert (
        checksum({"truncation": {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}})
        == same
    )
    assert checksum({"decoder": None}) == same
    assert checksum({"normalizer": {"type": "Lowercase"}}) != same
    model = content["model"]
    assert (
        checksum({"model": model | {"merges": [model["merges"][1], model["merges"][0], *model["merges"][2:]]}}) != same
    )


def test_another_end_of_document(trained: LoadedTokenizer, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path / "t")
    assert load_tokenizer([str(tmp_path / "t")], "e").end_of_document_token == trained.tokenizer.token_to_id("e")
    with pytest.raises(DataError, match="has no token '<eod>'"):
        load_tokenizer([str(tmp_path / "t")], "<eod>")


def test_what_ends_documents_ends_texts(trained: LoadedTokenizer, tmp_path: Path) -> None:
    """A foreign folder may have no eos token, or another one than --end-of-document names."""
    from transformers import AutoTokenizer

    foreign = tmp_path / "foreign"
    save_tokenizer(trained, foreign)
    added = Tokenizer.from_file(str(foreign / "tokenizer.json"))
    added.add_special_tokens(["<end>"])
    added.save(str(foreign / "tokenizer.json"))
    (foreign / "tokenizer_config.json").write_text('{"model_max_length": 1024}')  # all that GPT-2's own says
    for end, expected in ((None, "<|endoftext|>"), ("<end>", "<end>")):
        loaded = load_tokenizer([str(foreign)], end)
        assert not names_its_end(foreign) and loaded.kind == "hugging-face" and loaded.end_of_document == expected
        folder = tmp_path / expected.strip("<|>")
        save_tokenizer(loaded, folder)
        assert names_its_end(folder) and AutoTokenizer.from_pretrained(folder).eos_token == expected
        again = load_tokenizer([str(folder)])
        assert again.end_of_document == expected
        assert tokenizer_sha256(again.tokenizer) == tokenizer_sha256(added)
    assert not names_its_end(tmp_path)


def test_tokenizers_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocabulary.write_text("not json")
    merges.write_text("")
    for names, message in (
        (["a", "b", "c"], "one name or folder, or the two files"),
        ([str(tmp_path / "empty")], "holds no tokenizer"),
        ([str(broken)], "is not a tokenizer.json"),
        ([str(vocabulary), str(merges)], "are not the files of a BPE tokenizer"),
        ([str(vocabulary), str(vocabulary)], "the two tokenizer files are"),
        ([str(vocabulary), str(tmp_path / "none.txt")], "none.txt does not exist"),
        ([str(tmp_path / "nothing")], "nothing does not exist"),
        (["missing/tokenizer.json"], "tokenizer.json does not exist"),
        (["no-such-organisation/no-such-tokenizer"], "neither a file or folder here nor loadable by name"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(names)


def test_a_generic_tokenizer_is_saved_without_what_only_transformers_5_reads(tmp_path: Path) -> None:
    """transformers 4.57 has no class TokenizersBackend."""
    source = save(begins_with_bos(), tmp_path / "source", tokenizer_class="PreTrainedTokenizerFast")
    loaded = load_tokenizer([str(source)])
    save_tokenizer(loaded, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["eos_token"] == "</s>"
    assert not settings.keys() & {"backend", "is_local", "local_files_only"}
    assert tokenizer_sha256(load_tokenizer([str(tmp_path / "saved")]).tokenizer) == tokenizer_sha256(loaded.tokenizer)
