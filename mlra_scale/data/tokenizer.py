"""Loads, trains, checks and saves tokenizers.

Every tokenizer becomes a `tokenizers.Tokenizer`, with which the workers encode and which is stored beside the data. The
transformers library is only imported for a Hugging Face name or folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlra_scale.data import DataError
from mlra_scale.data.hub import unreachable_hub
from mlra_scale.files import native_errors

END_OF_TEXT = "<|endoftext|>"
# vocab.json, merges.txt is what Hugging Face calls GPT-2's files; encoder.json, vocab.bpe is what OpenAI called them.
_BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what the data need to know of it.

    Attributes:
        tokenizer: Without truncation and padding.
        kind: "hugging-face", "tokenizer.json", "gpt2-files" or "trained-bpe".
        name: What the user named.
        end_of_document: Text of the token that ends a document.
        hugging_face: The transformers object where it was loaded through that library, to be saved as it is.
    """

    tokenizer: Tokenizer
    kind: str
    name: str
    end_of_document: str
    hugging_face: Any = None

    @property
    def end_of_document_token(self) -> int:
        """Id of the token that ends a document."""
        token = self.tokenizer.token_to_id(self.end_of_document)
        assert token is not None
        return int(token)

    @property
    def vocabulary_size(self) -> int:
        """Largest id + 1 (ids may have gaps, and an embedding needs a row for each)."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def load_tokenizer(names: Sequence[str], end_of_document: str | None = None) -> LoadedTokenizer:
    """Loads a tokenizer.

    Args:
        names: One of: a Hugging Face name; a folder (Hugging Face format, a tokenizer.json, or GPT-2's vocab.json and
            merges.txt, also as encoder.json and vocab.bpe); a tokenizer.json; or the two GPT-2 files.
        end_of_document: Text of the token that ends documents; None: the tokenizer's eos token or <|endoftext|>.

    Raises:
        DataError: It cannot be loaded or has no usable end-of-document token.
    """
    label, hugging_face = " ".join(names), None
    kind, found = _find(names)
    if kind == "hugging-face":
        hugging_face = _from_hugging_face(label)
        tokenizer = hugging_face.backend_tokenizer
    else:
        tokenizer = _from_json(found[0]) if kind == "tokenizer.json" else _from_bpe_files(*found)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Special tokens in a text are text: a document that spells "<|endoftext|>" must not end there.
    tokenizer.encode_special_tokens = True
    end = end_of_document or (hugging_face.eos_token if hugging_face else None) or END_OF_TEXT
    if tokenizer.token_to_id(end) is None:
        hint = "choose one of its tokens with --end-of-document" if end_of_document is None else "it must be one token"
        raise DataError(f"tokenizer {label} has no token {end!r} to end documents with; {hint}")
    _make_special(tokenizer, end)
    return LoadedTokenizer(tokenizer, kind, label, end, hugging_face)


def _find(names: Sequence[str]) -> tuple[str, list[Path]]:
    """Returns the kind of a tokenizer, and its files where it is not Hugging Face's to read."""
    label, files = " ".join(names), [Path(name) for name in names]
    if len(files) not in (1, 2):
        raise DataError(f"a tokenizer is one name or folder, or the two files vocab.json merges.txt, not: {label}")
    if len(files) == 2:
        return "gpt2-files", _vocabulary_and_merges(files)
    path = files[0]
    if path.is_file():
        return "tokenizer.json", [path]
    if not path.is_dir():
        if label.startswith(("/", ".", "~")) or label.count("/") > 1 or path.suffix == ".json":
            raise DataError(f"tokenizer {label} does not exist")
        return "hugging-face", []
    if not (path / "tokenizer.json").is_file():
        for vocabulary, merges in _BPE_FILES:
            if (path / vocabulary).is_file() and (path / merges).is_file():
                return "gpt2-files", [path / vocabulary, path / merges]
    if (path / "tokenizer_config.json").is_file():
        return "hugging-face", []
    if not (path / "tokenizer.json").is_file():
        raise DataError(f"{label} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
    return "tokenizer.json", [path / "tokenizer.json"]


def _make_special(tokenizer: Tokenizer, end: str) -> None:
    """Makes an added token special, so that a text that spells it is text (see encode_special_tokens).

    A token of the plain vocabulary stays one, and the encoder refuses texts that give it.
    """
    number = tokenizer.token_to_id(end)
    for added, token in tokenizer.get_added_tokens_decoder().items():
        if added == number and not token.special:
            token.special = True
            tokenizer.add_special_tokens([token])


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> LoadedTokenizer:
    """Trains a byte-level BPE as GPT-2 has it: every text can be encoded, and decoding gives it back exactly.

    The tokens are 256 bytes, <|endoftext|> (id 0) and merges. A corpus with too little variety gives fewer than
    `vocabulary_size`.

    Raises:
        DataError: The vocabulary is too small for bytes and <|endoftext|>.
    """
    if vocabulary_size < 257:
        raise DataError(f"--train-bpe {vocabulary_size} is too small: 256 bytes and {END_OF_TEXT} need 257 tokens")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _trained(tokenizer, vocabulary_size)


def trained_bpe(folder: Path, vocabulary_size: int) -> LoadedTokenizer:
    """Reads back what `train_bpe` made and `save_tokenizer` saved.

    Raises:
        DataError: It is not there.
    """
    return _trained(_from_json(folder / "tokenizer.json"), vocabulary_size)


def _trained(tokenizer: Tokenizer, vocabulary_size: int) -> LoadedTokenizer:
    tokenizer.encode_special_tokens = True
    return LoadedTokenizer(tokenizer, "trained-bpe", f"byte-level BPE, {vocabulary_size}", END_OF_TEXT)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Returns a checksum of what decides the tokens of a text.

    It covers model, vocabulary, merges, normalizer, pre-tokenizer and added tokens, in one form whichever files they
    came from; it leaves out what does not change tokens (decoder, post-processor, truncation, offsets).
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.pop("merges", [])]
    vocabulary = model.pop("vocab")
    if isinstance(vocabulary, dict):
        vocabulary = sorted(vocabulary.items(), key=lambda item: item[1])
    pre_tokenizer = content["pre_tokenizer"]
    for part in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]):
        part.pop("trim_offsets", None)
    added = sorted((token["id"], token["content"]) for token in content["added_tokens"])
    parts = [model, vocabulary, merges, content["normalizer"], pre_tokenizer, added]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_tokenizer(loaded: LoadedTokenizer, folder: Path) -> None:
    """Makes a folder that AutoTokenizer reads, and that this module reads back to the same checksum.

    Its eos token is the one that ends documents, so that generation ends with what the model was trained to end with.
    """
    folder.mkdir()
    if loaded.hugging_face is not None:
        if loaded.hugging_face.eos_token != loaded.end_of_document:
            loaded.hugging_face.eos_token = loaded.end_of_document
        with native_errors(folder):
            loaded.hugging_face.save_pretrained(folder)
        _make_portable(folder / "tokenizer_config.json")
        return
    with native_errors(folder):
        loaded.tokenizer.save(str(folder / "tokenizer.json"))
        # Also as vocab.json and merges.txt, which Megatron-LM, GPT-NeoX and OpenAI's own code read.
        if isinstance(loaded.tokenizer.model, models.BPE):
            loaded.tokenizer.model.save(str(folder))
    end = loaded.end_of_document
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4 and 5
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "clean_up_tokenization_spaces": False,  # it would break the exact round trip
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _make_portable(path: Path) -> None:
    """Removes from tokenizer_config.json what transformers 5 writes for itself and transformers 4 cannot read."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def contradict(one: LoadedTokenizer, other: LoadedTokenizer) -> bool:
    """Whether the same number means different tokens in two tokenizers; one may have more tokens than the other."""
    tokens = [
        {number: token for token, number in loaded.tokenizer.get_vocab(with_added_tokens=True).items()}
        for loaded in (one, other)
    ]
    return any(tokens[1].get(number, token) != token for number, token in tokens[0].items())


def names_its_end(folder: Path) -> bool:
    """Whether a tokenizer's folder says in the way of save_tokenizer which token ends a text; foreign ones may not."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("eos_token"))


def _byte_level(model: Any) -> Tokenizer:
    """Returns a tokenizer with GPT-2's splitting into words and bytes around the model."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _vocabulary_and_merges(files: Sequence[Path]) -> list[Path]:
    vocabulary, merges = sorted(files, key=lambda file: file.suffix != ".json")
    for file in (vocabulary, merges):
        if not file.is_file():
            raise DataError(f"tokenizer file {file} does not exist")
    if vocabulary.suffix != ".json" or merges.suffix == ".json":
        raise DataError(f"the two tokenizer files are vocab.json and merges.txt, not {files[0]} and {files[1]}")
    return [vocabulary, merges]


def _from_bpe_files(vocabulary: Path, merges: Path) -> Tokenizer:
    try:
        tokenizer = _byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the Rust library raises plain Exception
        raise DataError(f"{vocabulary} and {merges} are not the files of a BPE tokenizer: {error}") from error
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error


def _from_hugging_face(name: str) -> Any:
    import transformers

    # A folder needs no hub; neither does what was downloaded before.
    silent = None if Path(name).is_dir() else unreachable_hub()
    try:
        # False: code that lies beside a tokenizer is not run, and the library does not stop to ask whether to.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, local_files_only=silent is not None, trust_remote_code=False
        )
    except Exception as error:  # many kinds: unknown name, no network, foreign folder, missing dependency
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if silent:
            reason = (
                f"{silent} does not answer, and the Hugging Face cache does not hold it; name a local folder with its "
                "files (tokenizer.json, or vocab.json and merges.txt), or fill the cache elsewhere, bring it here and "
                "set HF_HUB_OFFLINE=1"
            )
        raise DataError(
            f"tokenizer {name!r} is neither a file or folder here nor loadable by name: {reason}"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"tokenizer {name!r} has no fast version (tokenizer.json); convert it first")
    return tokenizer
