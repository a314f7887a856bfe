"""The configuration files of an export: model, generation, and for `mlra` the names of the shipped code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, GPT2Config

from mlra_scale.checkpoint.huggingface.loading import mlra_config
from mlra_scale.checkpoint.huggingface.tensors import Format
from mlra_scale.checkpoint.huggingface.tokenizer import SpecialTokens
from mlra_scale.config import ModelConfig


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
