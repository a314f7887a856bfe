"""The beginning of a text as sequences for a verification."""

from pathlib import Path

import pytest
import torch

from mlra_scale.data import DataError
from mlra_scale.data.tokenizer import load_tokenizer
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.verification_text import text_tokens, validation_documents
from tests.support.gpt2_folders import TEXT, tokenizer
from tests.unit.data.builders import config_for, prepare_texts


def write(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [str(path)]


def test_sequences_follow_each_other_with_one_token_more(tmp_path: Path) -> None:
    tokens = tokenizer().tokenizer.encode(TEXT).ids
    rows = text_tokens(write(tmp_path / "a.txt", TEXT), tokenizer(), length=16, num_tokens=50)
    assert rows.tolist() == [tokens[i : i + 17] for i in (0, 16, 32)]
    assert rows.dtype == torch.int64
    (row,) = text_tokens([str(tmp_path / "a.txt")], tokenizer(), length=64, num_tokens=10)
    assert row.tolist() == tokens[:65], "one sequence at least"


def test_documents_are_joined_as_in_training(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "Words")
    names = [*write(tmp_path / "b.txt", "tokens"), str(tmp_path / "a.txt")]
    first, second = (tokenizer().tokenizer.encode(text).ids for text in ("tokens", "Words"))
    end = [tokenizer().end_of_document_token]
    (row,) = text_tokens(names, tokenizer(), length=1000, num_tokens=1000)
    assert row.tolist() == first + end + second + end, "a short text is one short sequence"


def test_a_text_without_tokens_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"empty\.txt has \d tokens; the verification needs two"):
        text_tokens(write(tmp_path / "empty.txt", ""), tokenizer(), 16, 16)


def test_validation_documents_are_checked_block_by_block(tmp_path: Path) -> None:
    texts = [f"{TEXT} {number}" for number in range(40)]
    data = prepare_texts(tmp_path / "data", texts, train_bpe=257, validation_fraction=0.3)
    loaded = load_tokenizer([str(data / "tokenizer")])
    assert validation_documents(config_for(data), loaded, 100)
    path = data / "validation.bin"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"validation\.bin is damaged: .* at offset \d+"):
        validation_documents(config_for(data), loaded, 100)
