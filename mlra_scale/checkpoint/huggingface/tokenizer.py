"""The tokenizer of an export: written as new files, read back, and compared with that of training.

No file of the source is copied. A post-processor that adds tokens (a template such as `<s> $A`) is kept only where the
training text has those tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mlra_scale.checkpoint.files import CheckpointError, first_line
from mlra_scale.checkpoint.huggingface.configuration import SpecialTokens, quiet_transformers
from mlra_scale.checkpoint.huggingface.verification import VerificationError
from mlra_scale.config import ModelConfig
from mlra_scale.config.json_text import printable
from mlra_scale.files import native_errors

_PROBES = (
    "",
    "A word, and  two spaces.\n\n\tA tab: 12345 + x_1 == 'y';\r\n",
    " na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642 \u00a0 IT'S mIxEd don't ",
)
"""Texts that every written tokenizer is compared on: spaces at both ends, case, digits, other scripts."""
_OTHER_SPECIAL = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class EncodedText:
    """A text without the spelling of a special token, and its ids in training without the token that ends a document.

    Attributes:
        is_stored: Whether exactly these ids are in the training or validation data. Otherwise the tokenizer of training
            made them: decoding does not restore every text exactly, or the text is not from the data.
    """

    text: str
    tokens: Sequence[int]
    is_stored: bool = True


@dataclass(frozen=True)
class WrittenTokenizer:
    """What was written, and how a reader must encode: as `expected` does.

    Attributes:
        special: Ids of the special tokens.
        expected: The tokenizer as training applied it.
        adds_tokens: Whether its post-processor was kept.
        notes: What was left out, one sentence each.
    """

    special: SpecialTokens
    expected: Tokenizer
    adds_tokens: bool
    notes: tuple[str, ...]


def write_tokenizer(
    source: Path,
    folder: Path,
    model: ModelConfig,
    is_trained_here: bool,
    end: int | None = None,
    texts: Sequence[EncodedText] = (),
    is_prepared_here: bool = True,
) -> WrittenTokenizer:
    """Writes a tokenizer's files into an export.

    Args:
        source: Folder of the tokenizer in Hugging Face's format.
        folder: The export.
        model: The model's configuration; it limits the length of the input.
        is_trained_here: Whether this project trained the model; an imported one keeps its post-processor.
        end: Id of the token that ends documents; None: the tokenizer's eos token.
        texts: Texts of the training data with their ids, which show whether a post-processor was applied.
        is_prepared_here: Whether this project prepared the data, which applies no post-processor.

    Returns:
        What `check_tokenizer` compares the written files with.

    Raises:
        CheckpointError: It cannot be loaded, has more tokens than the model, lacks the token that ends documents, or
            nothing says whether training applied its post-processor.
    """
    original = load_tokenizer(source)
    backend = Tokenizer.from_str(original.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values())
    if largest >= model.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {source} has a token {largest}, the model has {model.vocab_size} tokens: they do not "
            "belong together; name the tokenizer that the model was trained with"
        )
    named = {name: getattr(original, name, None) for name in ("bos_token", "eos_token", *_OTHER_SPECIAL)}
    if end is not None:
        named["eos_token"] = backend.id_to_token(end)
        if named["eos_token"] is None:
            raise CheckpointError(
                f"the tokenizer of {source} has no token {end}, which ends documents (data.end_of_document_token); "
                "name the tokenizer that the data were made with (--tokenizer)"
            )
    notes = []
    adds_tokens = any(backend.num_special_tokens_to_add(is_pair=is_pair) > 0 for is_pair in (False, True))
    if adds_tokens and is_trained_here and not _is_applied(backend, texts):
        notes.append(_reason_to_drop_post_processor(backend, source, texts, is_prepared_here))
        backend.post_processor = None
        adds_tokens = False
    if is_trained_here and not adds_tokens:
        named["bos_token"] = named["eos_token"]  # in training a document begins after the token that ends another one
    if getattr(original, "chat_template", None):
        notes.append("the tokenizer's chat template is left out: the model was not trained on chats")
    with native_errors(folder):
        backend.save(str(folder / "tokenizer.json"))
        if (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
            backend.model.save(str(folder))  # the format that Megatron-LM, GPT-NeoX and OpenAI's own code read
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is, in transformers 4 and 5
        "model_max_length": model.max_positions,
        "clean_up_tokenization_spaces": False,  # decoding restores the text exactly
        **{name: str(token) for name, token in named.items() if token is not None and str(token) in vocabulary},
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    ids = (vocabulary.get(str(settings.get(name))) for name in ("bos_token", "eos_token", "pad_token"))
    return WrittenTokenizer(SpecialTokens(*ids), backend, adds_tokens, tuple(notes))


def _reason_to_drop_post_processor(
    backend: Tokenizer, source: Path, texts: Sequence[EncodedText], is_prepared_here: bool
) -> str:
    added = " ".join(printable(token, 40) for token in backend.encode("").tokens) or "special tokens"
    if any(text.is_stored for text in texts):
        reason = "the training text has none of its tokens"
    elif is_prepared_here:
        reason = "preparing data adds none of its tokens (no training text was compared; that of others may have them)"
    else:
        raise CheckpointError(
            f"the tokenizer of {source} has a post-processor ({added}), and nothing says whether training applied "
            "it: the data were not made by mlra-scale prepare, and none of their text was compared; verify on "
            "the run's validation data (without --text and --no-verify) or, where the training text has none of "
            "these tokens, name a copy of the tokenizer without its post-processor (--tokenizer)"
        )
    return f"the tokenizer's post-processor ({added}) is left out: {reason}"


def _is_applied(tokenizer: Tokenizer, texts: Sequence[EncodedText]) -> bool:
    """Whether the training text was encoded with the post-processor."""
    stored = [text for text in texts if text.is_stored] if tokenizer.num_special_tokens_to_add(is_pair=False) else []
    return bool(stored) and all(tokenizer.encode(text.text).ids == list(text.tokens) for text in stored)


def load_tokenizer(folder: Path) -> Any:
    """Loads a tokenizer as a user of stock transformers does, or raises CheckpointError; code beside it is not run."""
    try:
        with quiet_transformers():  # the library warns of a configuration whose class is beside it
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not loaded.is_fast:
            raise ValueError("it has no tokenizer.json (a fast tokenizer); convert it first")
        return loaded
    except Exception as error:  # the library raises many kinds; each means that this folder has no usable tokenizer
        reason = first_line(error)
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {reason}; name another one") from error


def check_tokenizer(folder: Path, written: WrittenTokenizer, texts: Sequence[EncodedText] = ()) -> None:
    """Loads the tokenizer of an export as its user does and compares it with that of training.

    A plain call on each of `texts` must give its ids.

    Raises:
        VerificationError: It does not load, or differs.
    """
    try:
        loaded = load_tokenizer(folder)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    expected = written.expected
    if loaded.get_vocab() != expected.get_vocab(with_added_tokens=True):
        raise VerificationError("the tokenizer reads back with other tokens than it was written with; use --tokenizer")
    mine, theirs = (json.loads(tokenizer.to_str()) for tokenizer in (expected, loaded.backend_tokenizer))
    for part in ("normalizer", "pre_tokenizer", "model", "decoder"):
        if mine[part] != theirs[part]:
            raise VerificationError(f"the {part} of the tokenizer reads back other than it was written")
    probes = [EncodedText(text, expected.encode(text, add_special_tokens=written.adds_tokens).ids) for text in _PROBES]
    for encoded in (*probes, *texts):
        tokens = loaded(encoded.text, verbose=False).input_ids  # without warnings about long texts
        if list(tokens) != list(encoded.tokens):
            raise VerificationError(_difference(encoded, tokens, loaded))


def _difference(encoded: EncodedText, tokens: Sequence[int], loaded: Any) -> str:
    """Describes where the ids of a text first differ."""
    pairs = zip(encoded.tokens, tokens, strict=False)
    shorter = min(len(tokens), len(encoded.tokens))
    index = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), shorter)

    def shown(ids: Sequence[int]) -> str:
        if index >= len(ids):
            return "none"
        return f"{ids[index]} ({printable(str(loaded.convert_ids_to_tokens(ids[index])), 40)})"

    return (
        f"its tokenizer is not that of training: at token {index} of the text {encoded.text[:60]!a} it gives "
        f"{shown(tokens)}, training had {shown(encoded.tokens)}; name the tokenizer that the data were made with "
        "(--tokenizer)"
    )
