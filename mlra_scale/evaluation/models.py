"""Opening a model for evaluation and generation: a store checkpoint, or a Hugging Face folder.

Both become a model of transformers; a checkpoint becomes that of modeling_mlra.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from mlra_scale.checkpoint import CheckpointError, Store, checkpoint_at
from mlra_scale.checkpoint.files import first_line, some_of
from mlra_scale.checkpoint.huggingface.configuration import DTYPES, model_from_store, quiet_transformers
from mlra_scale.config.json_text import printable, read_foreign_json_object
from mlra_scale.config.weight_map import weight_map
from mlra_scale.data import DataError
from mlra_scale.data.tokenizer import LoadedTokenizer, contradict, load_tokenizer
from mlra_scale.evaluation import EvaluationError
from mlra_scale.shipped.modeling_mlra import MlraConfig, MlraForCausalLM

# Masks that old versions of transformers stored as if they were weights.
_OLD_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")
_INDEX = "model.safetensors.index.json"
_MODEL_FILES = ("config.json", "generation_config.json", _INDEX)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "encoder.json")
_SMALL_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MIN_LAYER_BYTES = 512
"""In a pickled file: names and shapes of a layer's tensors alone take more."""


@dataclass(frozen=True)
class OpenedModel:
    """A language model of transformers in evaluation mode, with its checkpoint or folder, and that of its tokenizer."""

    module: Any
    path: Path
    vocab_size: int
    max_positions: int
    tokenizer_folder: Path | None

    def logits(self, tokens_BS: torch.Tensor, keep: int) -> torch.Tensor:
        """Returns the logits of the next token at the last `keep` positions, [B, keep, V]."""
        tokens_BS = tokens_BS.to(self.module.device)
        logits_BKV: torch.Tensor = self.module(input_ids=tokens_BS, use_cache=False, logits_to_keep=keep).logits
        return logits_BKV

    def tokenizer(self, name: str | None = None) -> LoadedTokenizer:
        """Loads the model's tokenizer, or the one that is named; no part of a text is read as a special token.

        Raises:
            EvaluationError: There is none, or it does not belong to the model.
            DataError: It cannot be read.
        """
        if name is None and self.tokenizer_folder is None:
            raise EvaluationError(f"{self.path} holds no tokenizer; name one with --tokenizer")
        folder = self.tokenizer_folder if name is None else Path(name)
        for file in _SMALL_TOKENIZER_FILES:
            if folder is not None and (folder / file).is_file():
                _read_json(folder / file)
        with quiet_transformers():
            loaded = load_tokenizer([str(folder) if name is None else name])
        if loaded.vocabulary_size > self.vocab_size:
            raise EvaluationError(
                f"tokenizer {loaded.name} has {loaded.vocabulary_size} tokens, the model of {self.path} "
                f"{self.vocab_size}: they do not belong together"
            )
        if name is not None and self.tokenizer_folder is not None:
            check_same_tokens(loaded, self.tokenizer_folder)
        return loaded


def check_same_tokens(loaded: LoadedTokenizer, own: Path) -> None:
    """Compares a tokenizer that was named for a model with the model's own, in the folder `own`.

    Raises:
        EvaluationError: They contradict each other. (The named one may have more tokens.)
    """
    try:
        with quiet_transformers():
            is_other = contradict(loaded, load_tokenizer([str(own)]))
    except DataError:  # another one may be named because this one cannot be loaded
        return
    if is_other:
        raise EvaluationError(
            f"tokenizer {loaded.name} gives other tokens than {own}, which the model was trained with: its text would "
            "be gibberish; leave --tokenizer out"
        )


def open_model(
    path: Path, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> OpenedModel:
    """Opens a model.

    Args:
        path: A checkpoint, a folder of them, a run directory (its newest complete checkpoint), or a folder in Hugging
            Face's format.
        dtype: A name of DTYPES: the type of weights and computation.
        device: "cpu", "cuda", or "auto": cuda where there is one.
        trust_remote_code: Whether the code in a foreign folder may run. That of this project's exports never does.

    Raises:
        EvaluationError: A Hugging Face folder cannot be loaded.
        CheckpointError: A checkpoint cannot be loaded, or there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("there is no GPU here (device cuda); use cpu")
    if (path / "config.json").is_file():
        return _open_folder(path, DTYPES[dtype], device, trust_remote_code)
    try:
        folder = checkpoint_at(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor is it a folder in Hugging Face's format (config.json)") from None
    store = Store.open(folder)
    model = store.model
    module = model_from_store(store, DTYPES[dtype]).to(device)
    return OpenedModel(module, folder, model.vocab_size, model.max_positions, store.tokenizer_folder)


def _open_folder(path: Path, dtype: torch.dtype, device: str, trust_remote_code: bool) -> OpenedModel:
    values = _read_model_files(path)
    is_ours = values.get("model_type") == MlraConfig.model_type
    if "auto_map" in values and not is_ours and not trust_remote_code:
        raise EvaluationError(f"{path} brings its own code; read it, then allow it with --trust-remote-code")
    factory = MlraForCausalLM if is_ours else transformers.AutoModelForCausalLM
    arguments = {} if is_ours else {"trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            module, report = factory.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True, **arguments
            )
    except Exception as error:  # of any kind: each means that the folder cannot be loaded
        raise EvaluationError(f"{path} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"]):
        raise EvaluationError(f"{path} lacks weights of its model, which would be random numbers: {some_of(missing)}")
    unknown = [name for name in sorted(report["unexpected_keys"]) if not _OLD_BUFFERS.search(name)]
    if unknown and values.get("model_type") in ("gpt2", MlraConfig.model_type):
        raise EvaluationError(f"{path} has weights unknown to its config.json (fewer layers?): {some_of(unknown)}")
    module = module.to(device).requires_grad_(False).eval()
    config = module.config.get_text_config()
    sizes: list[Any] = [getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings")]
    for size, name in zip(sizes, ("tokens", "positions"), strict=True):
        if type(size) is not int or size < 1:
            raise EvaluationError(f"{path}: its config.json does not say how many {name} the model has")
    vocab_size, positions = sizes
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
    return OpenedModel(module, path, vocab_size, positions, path if has_tokenizer else None)


def _read_model_files(folder: Path) -> dict[str, Any]:
    """Returns config.json after checking the JSON files of a model, which the library's errors would not name.

    More layers than there are weights are refused: building them would take for ever.
    """
    for name in _MODEL_FILES:
        if (folder / name).is_file():
            _read_json(folder / name)
    values = _read_json(folder / "config.json")
    limit, where = _max_layers(folder), printable(str(folder / "config.json"))
    for section in (values, *(value for value in values.values() if isinstance(value, dict))):
        for name in _LAYER_COUNTS:
            number = section.get(name)
            if number is None:  # other libraries write null for what a model does not have
                continue
            if type(number) is not int or number < 1:
                raise EvaluationError(f"{where}: {name} is {str(number)[:80]!a}; it must be a whole number from 1 on")
            if limit is not None and number > limit:
                raise EvaluationError(
                    f"{where}: {name} is {number}, but the weights beside it are those of {limit} layers at most; "
                    "restore the file that belongs to them"
                )
    return values


def _max_layers(folder: Path) -> int | None:
    """The number of tensors, which the number of layers cannot exceed; None where the folder has no weights."""
    try:
        if (folder / _INDEX).is_file():
            return len(weight_map(folder / _INDEX))
        if (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                return len(list(file.keys()))
    except (ValueError, OSError, SafetensorError) as error:
        raise EvaluationError(f"{printable(str(folder))} cannot be loaded: {first_line(error)}") from error
    sizes = [file.stat().st_size for file in folder.glob("*.bin")]
    return sum(sizes) // _MIN_LAYER_BYTES if sizes else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_foreign_json_object(path)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
