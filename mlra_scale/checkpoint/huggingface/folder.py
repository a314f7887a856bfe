"""The small files of an export: model and generation configuration, the shipped code, the tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2Config

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.huggingface.loading import mlra_config
from mlra_scale.checkpoint.huggingface.tensors import Format
from mlra_scale.config import ModelConfig

# What an export itself writes; a tokenizer's folder that holds such files as well keeps them to itself.
_OWN_FILES = {"config.json", "generation_config.json", "README.md", "modeling_mlra.py"}
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens; None where there is none.

    Attributes:
        begin: Begins a text.
        end: Ends a text, and so generation.
        padding: Fills batches.
    """

    begin: int | None = None
    end: int | None = None
    padding: int | None = None


def copy_tokenizer(source: Path, folder: Path, model: ModelConfig) -> SpecialTokens:
    """Copies a tokenizer's files into an export and tells it how long the model's input may be.

    Args:
        source: Folder of a tokenizer in Hugging Face's format.
        folder: The export.
        model: The model's configuration.

    Returns:
        The tokenizer's special tokens.

    Raises:
        CheckpointError: It cannot be loaded as stock transformers would, or has more tokens than the model.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in _OWN_FILES and file.suffix not in (".safetensors", ".bin"):
            shutil.copyfile(file, folder / file.name)
    settings = folder / _TOKENIZER_CONFIG
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
        values["model_max_length"] = model.max_positions
        settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{source / _TOKENIZER_CONFIG} cannot be read ({error}); name a tokenizer") from error
    tokenizer = load_tokenizer(folder)
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {source} has a token {largest}, the model has {model.vocab_size} tokens: they do not "
            "belong together; name the tokenizer that the model was trained with"
        )
    return SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def load_tokenizer(folder: Path) -> Any:
    """Loads a tokenizer as a user of stock transformers does.

    Args:
        folder: A folder in Hugging Face's format.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds; each means that this folder has no usable tokenizer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


def write_configuration(
    folder: Path, export_format: Format, model: ModelConfig, dtype: torch.dtype, special: SpecialTokens
) -> None:
    """Writes config.json and generation_config.json, and for `mlra` the model's code.

    Args:
        folder: The export.
        export_format: "gpt2" or "mlra".
        model: The model's configuration.
        dtype: Type of the written weights.
        special: Ids for the configurations.
    """
    if export_format == "gpt2":
        config, architecture = gpt2_config(model), "GPT2LMHeadModel"
    else:
        config, architecture = mlra_config(model), "MlraForCausalLM"
    config.architectures = [architecture]
    config.dtype = dtype
    config.bos_token_id, config.eos_token_id, config.pad_token_id = special.begin, special.end, special.padding
    config.save_pretrained(folder)
    if export_format == "mlra":
        _name_classes(folder / "config.json")
    # Without a padding token of its own, batches are filled with the token that ends texts, which is masked anyway.
    padding = special.end if special.padding is None else special.padding
    generation = GenerationConfig(bos_token_id=special.begin, eos_token_id=special.end, pad_token_id=padding)
    generation.save_pretrained(folder)


def gpt2_config(model: ModelConfig) -> GPT2Config:
    """Returns the stock configuration of a model whose projections are merged, without token ids.

    Args:
        model: The configuration of the trained model.
    """
    return GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_positions,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=None if model.ffn_size == 4 * model.hidden_size else model.ffn_size,
        activation_function="gelu_new",  # the tanh form, under the name that readers other than transformers know
        embd_pdrop=model.embedding_dropout,
        attn_pdrop=model.attention_dropout,
        resid_pdrop=model.residual_dropout,
        layer_norm_epsilon=model.layer_norm_eps,
        initializer_range=model.base_std,
        tie_word_embeddings=model.embedding_factor == 1.0,
        bos_token_id=None,  # not those of OpenAI's vocabulary
        eos_token_id=None,
    )


def _name_classes(path: Path) -> None:
    """Says in config.json where the code of the model is; saving a configuration alone names only its own class."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["auto_map"] = {
        "AutoConfig": "modeling_mlra.MlraConfig",
        "AutoModelForCausalLM": "modeling_mlra.MlraForCausalLM",
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
