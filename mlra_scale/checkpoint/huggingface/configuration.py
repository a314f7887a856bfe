"""Configurations for transformers, and the shipped model with the weights of a store."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, GPT2Config
from transformers.utils import logging

from mlra_scale.checkpoint.huggingface.tensors import Format, export_tensors
from mlra_scale.config import ModelConfig
from mlra_scale.shipped.modeling_mlra import MlraConfig, MlraForCausalLM

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that begin and end a text and that fill batches; None where there is none."""

    begin: int | None = None
    end: int | None = None
    padding: int | None = None


def write_configuration(
    folder: Path, export_format: Format, model: ModelConfig, dtype: torch.dtype, special: SpecialTokens
) -> None:
    """Writes config.json, with the type of the written weights, generation_config.json, and for `mlra` the code."""
    if export_format == "gpt2":
        config, architecture = gpt2_config(model), "GPT2LMHeadModel"
    else:
        config, architecture = mlra_config(model), "MlraForCausalLM"
    config.architectures = [architecture]
    config.dtype = dtype
    config.bos_token_id, config.eos_token_id, config.pad_token_id = special.begin, special.end, special.padding
    config.save_pretrained(folder)
    if export_format == "mlra":
        # Saving a configuration names only its own class; readers need that of the model too.
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        names = {"AutoConfig": "MlraConfig", "AutoModelForCausalLM": "MlraForCausalLM"}
        values["auto_map"] = {auto: f"modeling_mlra.{name}" for auto, name in names.items()}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    # Without a padding token of its own, batches are filled with the token that ends texts, which is masked anyway.
    padding = special.end if special.padding is None else special.padding
    generation = GenerationConfig(bos_token_id=special.begin, eos_token_id=special.end, pad_token_id=padding)
    generation.save_pretrained(folder)


def gpt2_config(model: ModelConfig) -> GPT2Config:
    """Returns the stock configuration of a model whose projections are merged, without token ids."""
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


def mlra_config(model: ModelConfig) -> MlraConfig:
    """Returns the shipped model's configuration, without token ids."""
    factorised = [name for name in ("q", "k", "v", "o") if model.is_factorised(name)]
    return MlraConfig(
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_positions,
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        intermediate_size=model.ffn_size,
        attention_rank=model.rank if factorised else None,
        factorised_projections=factorised,
        embedding_dropout=model.embedding_dropout,
        attention_dropout=model.attention_dropout,
        residual_dropout=model.residual_dropout,
        layer_norm_eps=model.layer_norm_eps,
        initializer_range=model.base_std,
        attention_init=model.attention_init if factorised else "gpt2",
        qk_norm=model.qk_norm,
        embedding_scale=model.embedding_factor,
    )


def model_from_store(store: Store, dtype: torch.dtype = torch.float32) -> MlraForCausalLM:
    """Builds the shipped model with the weights of a checkpoint, on the CPU, in evaluation mode, without gradients.

    In float32 a weight that one file of the checkpoint holds whole stays memory-mapped, unless an option is folded into
    it; the others are copies. Rows that pad the vocabulary are left out.
    """
    with torch.device("meta"):
        result = MlraForCausalLM(mlra_config(store.model))
    weights = {tensor.name: tensor.make().to(dtype) for tensor in export_tensors(store, "mlra")}
    missing, unexpected = result.load_state_dict(weights, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    result.tie_weights()
    return result.requires_grad_(False).eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses the library's progress bars and hints: faults are errors here."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
