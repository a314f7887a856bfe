"""Real text for verifying an export: the run's validation data, or a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

import torch

from mlra_scale.checkpoint.huggingface.tokenizer import EncodedText
from mlra_scale.config import Config, ConfigError
from mlra_scale.data.folder import open_prepared
from mlra_scale.data.indexed import IndexedFiles, open_indexed
from mlra_scale.data.manifest import MANIFEST_NAME
from mlra_scale.data.opening import open_datasets
from mlra_scale.data.tokenizer import LoadedTokenizer, tokenizer_sha256
from mlra_scale.evaluation import EvaluationError
from mlra_scale.evaluation.texts import PieceEncoder, document_tokens, documents_of_sources, joined

_REMEDY = "name the tokenizer that the data were made with (--tokenizer)"
_MOST_DOCUMENTS = 64
_LONGEST_DOCUMENT = 200_000
_UNSURE_TOKENS = 16
"""At the end of a document that was cut: the text after the cut may change how the last word is split."""


def validation_tokens(config: Config, num_tokens: int) -> torch.Tensor:
    """Returns the first validation sequences of a run, as `text_tokens` does.

    Raises:
        EvaluationError: The data that the configuration names are missing, or are others.
    """
    length = config.train.sequence_length
    try:
        stream = open_datasets(config).validation
    except ConfigError as error:
        raise EvaluationError(
            f"the validation data that the checkpoint's config.yaml names cannot be opened: {error}\n"
            "start from the folder that the training was started from, or name a text with --text"
        ) from error
    count = min(max(1, num_tokens // length), stream.samples_per_epoch)
    batch = stream.batch(0, count)
    return torch.cat([batch.tokens_BS, batch.targets_BS[:, -1:]], dim=1)


def text_tokens(names: Sequence[str], loaded: LoadedTokenizer, length: int, num_tokens: int) -> torch.Tensor:
    """Reads the beginning of a text (sources as of mlra-scale prepare), its documents joined as in training.

    About `num_tokens` tokens are read, at least one sequence; a text shorter than `length` gives one shorter sequence.

    Returns:
        Token ids [N, S + 1]: inputs and the token that follows them.

    Raises:
        EvaluationError: The text has less than two tokens.
        DataError: It cannot be read.
    """
    wanted = max(1, num_tokens // length) * length + 1
    encoder = PieceEncoder(loaded, wanted)
    documents = joined(documents_of_sources(names, encoder), encoder.end_of_document)
    tokens = list(islice((token for piece in documents for token in piece.tokens), wanted))
    if len(tokens) < 2:
        raise EvaluationError(f"{' '.join(names)} has {len(tokens)} tokens; the verification needs two at least")
    length = min(length, len(tokens) - 1)
    return torch.tensor(tokens).unfold(0, length + 1, length).contiguous()


def validation_documents(config: Config, loaded: LoadedTokenizer, num_tokens: int) -> list[EncodedText]:
    """Reads validation documents of a run as text with their ids; call `validation_tokens`, which checks them, first.

    About `num_tokens` tokens of each data set are read, at least one document.

    Raises:
        EvaluationError: The tokenizer ends documents with another token than the data, or did not make the data.
        DataError: The data cannot be read.
    """
    data = config.data
    found: list[EncodedText] = []
    for name in filter(None, [data.validation_path] if data.validation_path else data.blend or [data.path]):
        end = data.end_of_document_token
        has_manifest = (Path(name) / MANIFEST_NAME).is_file()
        if has_manifest:
            manifest, opened = open_prepared(Path(name))
            files, end = opened["validation"], manifest.tokenizer.end_of_document_token
            if end != loaded.end_of_document_token:
                raise EvaluationError(
                    f"the documents of {name} end with token {end}, the tokenizer {loaded.name} ends texts with "
                    f"{loaded.end_of_document_token}; {_REMEDY}"
                )
        else:
            files = open_indexed(name)
        documents = encoded_documents(loaded, _last_documents(files, end, num_tokens))
        if documents and not has_manifest and not any(document.is_stored for document in documents):
            raise EvaluationError(f"{name} holds other ids than tokenizer {loaded.name} gives for its text; {_REMEDY}")
        found += documents
    return found


def encoded_documents(loaded: LoadedTokenizer, documents: Iterable[Sequence[int]]) -> list[EncodedText]:
    """Decodes documents (ids without the end token) and encodes the text again, as users of the exported tokenizer do.

    A document that spells a special token is left out: in training that was text, a user's tokenizer reads the token.
    Of each other one, `tokens` are its ids where its text gives them again, else the ids of its text.
    """
    tokenizer, found = loaded.tokenizer, []
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for document in documents:
        ids = list(document)
        cut = ids[:_LONGEST_DOCUMENT]
        text = tokenizer.decode(cut, skip_special_tokens=False)
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        sure = len(cut) - _UNSURE_TOKENS
        is_stored = tokens == ids if cut == ids else tokens[:sure] == cut[:sure]
        if not is_stored:
            # Foreign data may hold the tokens that the tokenizer's post-processor adds.
            plain = tokenizer.decode(cut, skip_special_tokens=True)
            if tokenizer.encode(plain).ids == cut:
                text, tokens, is_stored = plain, cut, True
        if not any(token in text for token in special):
            found.append(EncodedText(text, tokens, is_stored))
    return found


def documents_of_sequences(loaded: LoadedTokenizer, tokens_NS: torch.Tensor) -> list[EncodedText]:
    """Returns `encoded_documents` of a text from `text_tokens`, which need not be in the data (is_stored is False)."""
    tokens = [*tokens_NS[:, :-1].flatten().tolist(), int(tokens_NS[-1, -1])]
    groups = groupby(tokens, lambda token: token == loaded.end_of_document_token)
    documents = [list(group) for is_end, group in groups if not is_end]
    return [replace(document, is_stored=False) for document in encoded_documents(loaded, documents)]


def check_checksum(loaded: LoadedTokenizer, recorded: str | None) -> None:
    """Raises EvaluationError if a tokenizer has another checksum than that of training, where one is recorded."""
    if recorded is not None and tokenizer_sha256(loaded.tokenizer) != recorded:
        raise EvaluationError(
            f"tokenizer {loaded.name} is not the one of training, whose checksum the checkpoint records "
            f"({recorded[:16]}): it was changed since then; use another checkpoint, or {_REMEDY}"
        )


def _last_documents(files: IndexedFiles, end: int | None, num_tokens: int) -> Iterator[list[int]]:
    """Documents from the last one backwards: where one data set serves both, its end is the validation share."""
    stored, left = files.tokens(), num_tokens
    for number in reversed(range(max(0, files.num_documents - _MOST_DOCUMENTS), files.num_documents)):
        if left <= 0:
            return
        tokens = document_tokens(files, stored, number)
        if tokens and tokens[-1] == end:
            tokens.pop()
        left -= len(tokens)
        if tokens:
            yield tokens
