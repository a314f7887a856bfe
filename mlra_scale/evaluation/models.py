"""Opens what can be evaluated and written with: a store checkpoint, or a Hugging Face folder.

Both become a model of transformers, a checkpoint that of modeling_mlra.py, so there is one way through a model.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.location import checkpoint_at
from mlra_scale.config.json_text import printable
from mlra_scale.data.errors import DataError
from mlra_scale.data.tokenizer import LoadedTokenizer, contradict, load_tokenizer
from mlra_scale.evaluation.errors import EvaluationError
from mlra_scale.evaluation.folder_files import check_tokenizer_files, read_model_files, reason_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Masks that old versions of transformers stored as if they were weights.
_OLD_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "encoder.json")


@dataclass(frozen=True)
class OpenedModel:
    """A language model in evaluation mode.

    Attributes:
        module: The model, one of transformers' (or a remote one in its style).
        path: The checkpoint or folder that it came from.
        kind: "checkpoint" or the folder's model_type.
        vocab_size: Number of tokens.
        max_positions: Longest input.
        tokenizer_folder: Folder with the model's tokenizer, if there is one.
    """

    module: Any
    path: Path
    kind: str
    vocab_size: int
    max_positions: int
    tokenizer_folder: Path | None

    def logits(self, tokens_BS: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the next token at the last `keep` positions, [B, keep, V]."""
        tokens_BS = tokens_BS.to(self.module.device)
        logits_BKV: torch.Tensor = self.module(input_ids=tokens_BS, use_cache=False, logits_to_keep=keep).logits
        return logits_BKV

    def tokenizer(self, name: str | None = None) -> LoadedTokenizer:
        """Loads the tokenizer.

        Args:
            name: Folder or file of another tokenizer than the model's own.

        Returns:
            The tokenizer, for which text is text: no part of it is read as a special token.

        Raises:
            EvaluationError: There is none, or it does not belong to the model.
            DataError: It cannot be read.
        """
        if name is None and self.tokenizer_folder is None:
            raise EvaluationError(f"{self.path} holds no tokenizer; name one with --tokenizer")
        place = self.tokenizer_folder if name is None else Path(name)
        if place is not None and place.is_dir():
            check_tokenizer_files(place)
        with _quiet_transformers():
            loaded = load_tokenizer([str(place) if name is None else name])
        if loaded.vocabulary_size > self.vocab_size:
            raise EvaluationError(
                f"tokenizer {loaded.name} has {loaded.vocabulary_size} tokens, the model of {self.path} "
                f"{self.vocab_size}: they do not belong together"
            )
        if name is not None and self.tokenizer_folder is not None:
            check_same_tokens(loaded, self.tokenizer_folder)
        return loaded


def check_same_tokens(loaded: LoadedTokenizer, own: Path) -> None:
    """Refuses a tokenizer that was named for a model and means other tokens than the model's own.

    Args:
        loaded: The one that was named; it may have more tokens.
        own: Folder of the model's own.

    Raises:
        EvaluationError: They contradict each other: to the model its text would be gibberish.
    """
    try:
        with _quiet_transformers():
            is_other = contradict(loaded, load_tokenizer([str(own)]))
    except DataError:  # what cannot be loaded may be why another one was named
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
        path: A store checkpoint, a folder of them, a run directory (its newest complete checkpoint), or a folder in
            Hugging Face's format.
        dtype: A name of DTYPES: the type of weights and computation.
        device: "cpu", "cuda", or "auto": cuda where there is one.
        trust_remote_code: Whether a foreign Hugging Face folder may run the code that lies in it. Exports of this
            project are run with the project's own.

    Returns:
        The model.

    Raises:
        EvaluationError: A Hugging Face folder cannot be loaded.
        CheckpointError: A checkpoint cannot be loaded, or there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("there is no GPU here (device cuda); use cpu")
    if (path / "config.json").is_file():
        return _from_folder(path, DTYPES[dtype], device, trust_remote_code)
    try:
        checkpoint = checkpoint_at(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor is it a folder in Hugging Face's format (config.json)") from None
    return _from_checkpoint(checkpoint, DTYPES[dtype], device)


def _from_checkpoint(path: Path, dtype: torch.dtype, device: str) -> OpenedModel:
    from mlra_scale.checkpoint.huggingface.loading import model_from_store
    from mlra_scale.checkpoint.reader import Store

    store = Store.open(path)
    module = model_from_store(store, dtype).to(device)
    return OpenedModel(
        module, path, "checkpoint", store.model.vocab_size, store.model.max_positions, store.tokenizer_folder
    )


def _from_folder(path: Path, dtype: torch.dtype, device: str, trust_remote_code: bool) -> OpenedModel:
    import transformers

    from mlra_scale.checkpoint.huggingface.modeling_mlra import MlraConfig, MlraForCausalLM

    values = read_model_files(path)
    is_ours = values.get("model_type") == MlraConfig.model_type
    if "auto_map" in values and not is_ours and not trust_remote_code:
        raise EvaluationError(f"{path} brings its own code; read it, then allow it with --trust-remote-code")
    # The library raises errors of many kinds; to the user each means that this folder cannot be loaded.
    try:
        factory = MlraForCausalLM if is_ours else transformers.AutoModelForCausalLM
        arguments = {} if is_ours else {"trust_remote_code": trust_remote_code}
        with _quiet_transformers():
            module, report = factory.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True, **arguments
            )
    except Exception as error:
        raise EvaluationError(f"{path} cannot be loaded: {reason_of(error)}") from error
    if missing := sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"]):
        raise EvaluationError(
            f"{path} lacks weights of its model, which would be random numbers: {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        )
    unknown = [name for name in sorted(report["unexpected_keys"]) if not _OLD_BUFFERS.search(name)]
    if unknown and values.get("model_type") in ("gpt2", MlraConfig.model_type):
        raise EvaluationError(
            f"{path} has weights that its config.json has no place for (fewer layers?): "
            + printable(", ".join(unknown[:4]))
            + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        )
    module = module.to(device).requires_grad_(False).eval()
    config = module.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings")]
    for size, name in zip(sizes, ("tokens", "positions"), strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise EvaluationError(f"{path}: its config.json does not say how many {name} the model has")
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
    vocab_size, positions = (int(size) for size in sizes if size is not None)
    return OpenedModel(module, path, config.model_type, vocab_size, positions, path if has_tokenizer else None)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps the library's progress bars and hints out of the results; what is wrong is an error here."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
