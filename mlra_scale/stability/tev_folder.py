"""TEV of Hugging Face checkpoint folders: only the embedding is read, mapped from its file; no model is built."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from mlra_scale.config.json_text import printable, read_foreign_json_object
from mlra_scale.config.weight_map import weight_map
from mlra_scale.console import InputError
from mlra_scale.stability.embedding_names import HEAD_NAMES, input_embeddings
from mlra_scale.stability.tev import TevStatistics, tev_of_matrix

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class EmbeddingReport:
    """TEV of one tensor of a checkpoint, over its real tokens; `rows` are those that are stored."""

    name: str
    role: Literal["input", "head"]
    rows: int
    hidden_size: int
    dtype: str
    statistics: TevStatistics


def tev_of_folder(
    path: Path, tensor: str | None = None, num_tokens: int | None = None, extremes: int = 0
) -> tuple[list[EmbeddingReport], bool]:
    """Measures TEV of a checkpoint's input embedding, and of the head if that is a separate tensor.

    Args:
        path: A checkpoint folder with model.safetensors, one or in shards, or a single .safetensors file.
        tensor: Name of the tensor to measure; nothing else is then reported.
        num_tokens: Number of real tokens. None: vocab_size of config.json if that is smaller than the number of rows,
            else all rows.
        extremes: How many of the highest and of the lowest tokens to list.

    Returns:
        The reports, and whether the head shares the input embedding, according to the tensors and config.json.

    Raises:
        InputError: The path holds no readable embedding.
    """
    files = _tensor_files(path)
    config = _read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if tensor is not None and tensor not in files:
        raise InputError(f"{path} has no tensor {tensor!r}; it has {_some(sorted(files))}")
    name = tensor or _input_name(path, files)
    text_config = config.get("text_config")
    vocab_size = (text_config if isinstance(text_config, dict) else config).get("vocab_size")
    with _mapped(files[name], name) as matrix:
        rows = len(matrix)
        if num_tokens is None and type(vocab_size) is int and 0 < vocab_size < rows:  # true is no number of tokens
            num_tokens = vocab_size
        if num_tokens is not None and not 0 < num_tokens <= rows:
            raise InputError(f"{name} has {rows} rows, not {num_tokens} tokens")
        embeddings = [_measure(name, "input", matrix, num_tokens, extremes)]
        head = None if tensor else _head_name(files, name)
        if head is None:
            return embeddings, tensor is None and _says_tied(config)
        with _mapped(files[head], head) as head_matrix:
            if head_matrix.shape == matrix.shape and torch.equal(head_matrix, matrix):
                return embeddings, True
            embeddings.append(_measure(head, "head", head_matrix, min(num_tokens or rows, len(head_matrix)), extremes))
    return embeddings, False


def token_texts(path: Path) -> Callable[[int], str | None]:
    """Returns the text of a token by the folder's tokenizer.json or vocab.json; without them every text is None."""
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more precise
            raise InputError(f"{folder / 'tokenizer.json'} is not a tokenizer: {printable(str(error), 300)}") from error

        def decode(token: int) -> str | None:
            raw = tokenizer.id_to_token(token)
            text = tokenizer.decode([token], skip_special_tokens=False) if raw is not None else ""
            # A part of a character decodes to the replacement character; the raw token is shown instead.
            return text if text and "\ufffd" not in text else raw

        return decode
    if (folder / "vocab.json").is_file():
        vocabulary = _read_json(folder / "vocab.json")
        if not all(type(number) is int for number in vocabulary.values()):
            raise InputError(f"{folder / 'vocab.json'} is not a vocabulary: every token must have a whole number")
        return {number: token for token, number in vocabulary.items()}.get
    return lambda token: None


def _measure(
    name: str, role: Literal["input", "head"], matrix: torch.Tensor, num_tokens: int | None, extremes: int
) -> EmbeddingReport:
    statistics = tev_of_matrix(matrix, num_tokens, extremes=extremes)
    if not math.isfinite(statistics.mean):
        raise InputError(f"{name} holds values that are not finite")
    rows, hidden_size = matrix.shape
    return EmbeddingReport(name, role, rows, hidden_size, str(matrix.dtype).removeprefix("torch."), statistics)


def _tensor_files(path: Path) -> dict[str, Path]:
    """Returns the file of each tensor."""
    if path.is_file():
        files = [path]
    elif not path.is_dir():
        raise InputError(f"{path} is not there")
    elif (path / INDEX).is_file():
        try:
            return {name: path / file for name, file in weight_map(path / INDEX).items()}
        except ValueError as error:
            raise InputError(str(error)) from None
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        old = any(path.glob("pytorch_model*.bin"))
        hint = " (pytorch_model.bin is a pickle, which can run code: save it again with safetensors)" if old else ""
        raise InputError(f"{path} has no .safetensors file{hint}")
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as handle:
            found.update(dict.fromkeys(handle.keys(), file))
    return found


def _input_name(path: Path, files: dict[str, Path]) -> str:
    names = input_embeddings(files)
    if len(names) == 1:
        return names[0]
    if names:
        raise InputError(f"{path} has several embeddings: choose one with --tensor: {_some(names)}")
    raise InputError(
        f"no tensor of {path} is named like an embedding: choose one with --tensor: {_some(sorted(files))}"
    )


def _head_name(files: dict[str, Path], input_name: str) -> str | None:
    """Returns the head that belongs to the input embedding: under the same prefix, or at the top."""
    for ending in HEAD_NAMES:
        names = [name for name in files if name == ending or name.endswith("." + ending)]
        outermost = sorted(names, key=lambda name: (name.count("."), name))
        if outermost and outermost[0].count(".") <= input_name.count("."):
            return outermost[0]
    return None


def _says_tied(config: dict[str, Any]) -> bool:
    """Returns whether a checkpoint without a head is a language model whose head is the embedding."""
    is_language_model = any(kind in str(config.get("architectures")) for kind in ("LMHead", "CausalLM"))
    return is_language_model and bool(config.get("tie_word_embeddings", True))


@contextmanager
def _mapped(file: Path, name: str) -> Iterator[torch.Tensor]:
    """Yields one matrix of a file, paged in as it is read."""
    with _opened(file) as handle:
        if name not in handle.keys():  # noqa: SIM118 (a handle is no mapping)
            raise InputError(f"{file} has no tensor {name!r}, although the index says so")
        matrix = handle.get_tensor(name)
        if matrix.dim() != 2 or not matrix.is_floating_point() or not matrix.numel():
            kind = str(matrix.dtype).removeprefix("torch.")
            raise InputError(f"{name} is no embedding: {kind} {list(matrix.shape)}")
        yield matrix


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {printable(str(error), 300)}") from error
    with handle as opened:
        yield opened


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_foreign_json_object(file)
    except ValueError as error:
        raise InputError(str(error)) from None


def _some(names: list[str], count: int = 8) -> str:
    """Returns the first few of many names."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return printable(", ".join(names[:count])) + more
