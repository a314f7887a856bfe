"""The shipped model in this process, with weights straight from a store: what evaluation and generation run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlra_scale.checkpoint.huggingface.modeling_mlra import MlraConfig, MlraForCausalLM
from mlra_scale.checkpoint.huggingface.plain import PlainWeights
from mlra_scale.config import ModelConfig

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store


def mlra_config(model: ModelConfig) -> MlraConfig:
    """Returns the shipped model's configuration for one of ours, without token ids of a tokenizer.

    Args:
        model: The configuration of the trained model.
    """
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
        qk_norm=model.qk_norm,
        embedding_scale=model.embedding_factor,
    )


def model_from_store(store: Store, dtype: torch.dtype = torch.float32) -> MlraForCausalLM:
    """Builds the shipped model with the weights of a checkpoint, in evaluation mode and without gradients.

    In float32 a weight that one file of the checkpoint holds whole stays where it is, memory-mapped; the others, those
    that an option is folded into, and all of them in other types, take memory of their own. Rows that pad the
    vocabulary are left out.

    Args:
        store: An open checkpoint.
        dtype: Type of the weights.

    Returns:
        The model on the CPU.
    """
    with torch.device("meta"):
        result = MlraForCausalLM(mlra_config(store.model))
    weights, plain = {}, PlainWeights(store)
    for name in plain.names:
        tensor = plain[name]
        if name == "embedding.weight":
            tensor = tensor[: store.model.vocab_size]
        weights[f"model.{name}"] = tensor.to(dtype)
    missing, unexpected = result.load_state_dict(weights, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    result.tie_weights()
    return result.requires_grad_(False).eval()
