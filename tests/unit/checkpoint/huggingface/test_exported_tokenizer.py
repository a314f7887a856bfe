"""The tokenizer of an export: ids of training in a plain call, nothing passed through, and every difference refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.huggingface.tokenizer import EncodedText, WrittenTokenizer, check_tokenizer, write_tokenizer
from mlra_scale.checkpoint.huggingface.verification import VerificationError
from mlra_scale.config import ModelConfig
from mlra_scale.data.tokenizer import load_tokenizer, tokenizer_sha256
from tests.support.foreign_tokenizers import CORPUS, begins_with_bos, byte_level, end_is_not_special, save, template
from tests.unit.checkpoint.huggingface.builders import model_config

TEXT = "Document 7 about deep layers:  norms, and caf\u00e9s\n\tof gradient 12"
CONFIG_KEYS = {"tokenizer_class", "model_max_length", "clean_up_tokenization_spaces", "bos_token", "eos_token"}


def has_both() -> Tokenizer:
    tokenizer = byte_level("<s>", "</s>")
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template(tokenizer, "<s> $A </s>", "<s> $A </s> $B </s>")]
    )
    return tokenizer


def only_pairs() -> Tokenizer:
    tokenizer = byte_level("<s>", "</s>")
    tokenizer.post_processor = template(tokenizer, "$A", "$A </s> $B")
    return tokenizer


def roberta() -> Tokenizer:
    tokenizer = byte_level("<s>", "</s>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def unigram() -> Tokenizer:
    """As of SentencePiece: lossy at both ends, with a normalizer, a space before the first word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = template(tokenizer, "<s> $A </s>")
    return tokenizer


def truncating() -> Tokenizer:
    tokenizer = byte_level("</s>")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_id=0, pad_token="</s>")
    return tokenizer


MADE = (begins_with_bos, has_both, only_pairs, roberta, unigram, end_is_not_special, truncating)
KINDS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    **{make.__name__: (make, "PreTrainedTokenizerFast") for make in MADE},
    "as transformers 5 saves it": (begins_with_bos, "TokenizersBackend"),
    "without a class": (begins_with_bos, ""),
}


def source_of(folder: Path, kind: str, **settings: Any) -> Path:
    """A tokenizer's folder as other people leave it, with more than the tokenizer in it."""
    make, name = KINDS[kind]
    foreign = {"is_local": True, "local_files_only": False, "backend": "tokenizers"}
    save(make(), folder, **foreign, **({"tokenizer_class": name} if name else {}), **settings)
    (folder / "notes.txt").write_text("private")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def model(vocab_size: int = 400) -> ModelConfig:
    return model_config().model_copy(update={"vocab_size": vocab_size})


def write(tmp_path: Path, source: Path, is_trained_here: bool = True, **more: Any) -> WrittenTokenizer:
    (tmp_path / "out").mkdir()
    return write_tokenizer(source, tmp_path / "out", model(), is_trained_here, **more)


def trained_ids(source: Path, text: str = TEXT) -> list[int]:
    """The ids that preparing data gives."""
    return load_tokenizer([str(source)]).tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_call_gives_the_ids_of_training(tmp_path: Path, kind: str) -> None:
    source = source_of(tmp_path / "source", kind)
    texts = [EncodedText(TEXT, trained_ids(source))]
    written = write(tmp_path, source, texts=texts)
    check_tokenizer(tmp_path / "out", written, texts)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(TEXT).input_ids == trained_ids(source) and len(trained_ids(source)) > 4
    assert loaded.model_max_length == 32
    # A document begins after the token that ends another one, so that is what begins a text.
    assert loaded.bos_token == loaded.eos_token == "</s>"
    assert written.special.begin == written.special.end == loaded.convert_tokens_to_ids("</s>")
    same = [load_tokenizer([str(folder)]).tokenizer for folder in (source, tmp_path / "out")]
    assert tokenizer_sha256(same[0]) == tokenizer_sha256(same[1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings.keys() - {"pad_token"} == CONFIG_KEYS and settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("kind", ["begins_with_bos", "has_both", "roberta", "unigram"])
@pytest.mark.parametrize("is_compared", [False, True])
def test_what_is_taken_out_is_said_and_what_was_not_compared_is_not_claimed(
    tmp_path: Path, kind: str, is_compared: bool
) -> None:
    source = source_of(tmp_path / "source", kind)
    written = write(tmp_path, source, texts=[EncodedText(TEXT, trained_ids(source), is_stored=is_compared)])
    (note,) = written.notes
    assert "post-processor (<s>" in note and "is left out" in note and not written.adds_tokens
    assert ("no training text was compared" in note) is not is_compared
    assert ("the training text has none of its tokens" in note) is is_compared


@pytest.mark.parametrize("is_stored", [None, False, True])
def test_nothing_is_assumed_of_data_that_others_prepared(tmp_path: Path, is_stored: bool | None) -> None:
    """Neither --no-verify (no texts) nor --text (not from the data) says whether training applied a post-processor."""
    source = source_of(tmp_path / "source", "begins_with_bos")
    texts = [] if is_stored is None else [EncodedText(TEXT, trained_ids(source), is_stored)]
    if is_stored:
        assert "the training text has none" in write(tmp_path, source, texts=texts, is_prepared_here=False).notes[0]
    else:
        with pytest.raises(CheckpointError, match=r"post-processor \(<s>\), and nothing says .* \(--tokenizer\)"):
            write(tmp_path, source, texts=texts, is_prepared_here=False)
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["begins_with_bos", "has_both"])
def test_a_post_processor_whose_tokens_the_data_hold_is_kept(tmp_path: Path, kind: str) -> None:
    source = source_of(tmp_path / "source", kind)
    ids = AutoTokenizer.from_pretrained(source)(TEXT).input_ids
    assert ids[0] == 0 and ids != trained_ids(source)
    written = write(tmp_path, source, texts=[EncodedText(TEXT, ids)])
    check_tokenizer(tmp_path / "out", written, [EncodedText(TEXT, ids)])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(TEXT).input_ids == ids and loaded.bos_token == "<s>" and written.notes == ()


def test_an_imported_tokenizer_keeps_its_post_processor(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "begins_with_bos")
    check_tokenizer(tmp_path / "out", write(tmp_path, source, is_trained_here=False))
    ids = [AutoTokenizer.from_pretrained(folder)(TEXT).input_ids for folder in (source, tmp_path / "out")]
    assert ids[0] == ids[1] and ids[0][0] == 0


def test_a_chat_template_is_left_out_and_said(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "only_pairs", chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
    written = write(tmp_path, source)
    assert any("chat template" in note for note in written.notes)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_the_token_that_ends_documents_is_that_of_the_configuration(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "begins_with_bos", eos_token="<s>")
    assert write(tmp_path, source, end=1).special.end == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    with pytest.raises(CheckpointError, match=r"has no token 5000, which ends documents .*; name the tokenizer"):
        write_tokenizer(source, tmp_path / "out", model(), True, end=5000)


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def add_template(content: dict[str, Any]) -> None:
    content["post_processor"] = json.loads(begins_with_bos().to_str())["post_processor"]


def drop_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop(0)


def prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize("change", [swap, lower_case, add_template, drop_merge, prefix_space])
def test_a_tokenizer_that_reads_back_other_fails(tmp_path: Path, change: Callable[..., None]) -> None:
    source = source_of(tmp_path / "source", "begins_with_bos")
    written = write(tmp_path, source)
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(VerificationError, match="tokenizer"):
        check_tokenizer(tmp_path / "out", written)


def test_other_ids_than_the_data_hold_are_told_with_the_place(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "begins_with_bos")
    written = write(tmp_path, source)
    ids = trained_ids(source)
    ids[3] = 7
    message = (
        r"not that of training: at token 3 of the text 'Document .* it gives \d+ \(.*\), training had 7 \(.*\); name"
    )
    with pytest.raises(VerificationError, match=message):
        check_tokenizer(tmp_path / "out", written, [EncodedText(TEXT, ids)])
    with pytest.raises(VerificationError, match="training had none"):
        check_tokenizer(tmp_path / "out", written, [EncodedText(TEXT, ids[:2])])


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [NESTED, "[1, 2]", "null", "{", '{"\x1b[31m": 1', "", '{"model": "\\u001b[2J"}', "\ud800"]
)
def test_a_damaged_tokenizer_is_one_error(tmp_path: Path, file: str, content: str) -> None:
    source = source_of(tmp_path / "source", "begins_with_bos")
    (source / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    (tmp_path / "out").mkdir()
    if file == "tokenizer_config.json" and content.startswith('{"model"'):
        write_tokenizer(source, tmp_path / "out", model(), True)  # a key that nothing reads
        return
    with pytest.raises(CheckpointError) as caught:
        write_tokenizer(source, tmp_path / "out", model(), True)
    message = str(caught.value)
    assert str(source) in message and message.isprintable() and len(message) < 1000


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "begins_with_bos")
    (source / "tokenizer.json").unlink()
    shutil.copy(source / "notes.txt", source / "vocab.json")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        write(tmp_path, source)
