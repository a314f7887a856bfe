"""Small checkpoints of random weights, biases and norms, with a tokenizer, and text for them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from mlra_scale.checkpoint.huggingface.exporting import VerificationText
from mlra_scale.checkpoint.reader import Store
from mlra_scale.checkpoint.weights import write_weights
from mlra_scale.config import ModelConfig
from mlra_scale.data.tokenizer import save_tokenizer
from tests.support.gpt2_folders import tokenizer
from tests.support.layouts import canonical_weights
from tests.support.oracle import initial_vectors

_COMPLETEP = {"depth_rule": "completep", "base_depth": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "mlra": {},
    "dense": {"attention": "dense"},
    "qkvo": {"factorised_projections": ("q", "k", "v", "o")},
    "vo": {"factorised_projections": ("v", "o"), "ffn_hidden_size": 40, "layer_norm_eps": 1e-3},
    "sigma-reparam": {"sigma_reparam": True, "factorised_projections": ("q", "o")},
    "layer-norm-scaling": {"layer_norm_scaling": True, "attention": "dense"},
    "embedding-scale": {"embedding_scale": "sqrt_width"},
    "folding": {"sigma_reparam": True, "layer_norm_scaling": True, "embedding_scale": "sqrt_width"},
    "completep": {**_COMPLETEP, "factorised_projections": ("q", "o")},
    "completep-dense": {**_COMPLETEP, "attention": "dense"},
    "completep-folding": {**_COMPLETEP, "sigma_reparam": True, "embedding_scale": "sqrt_width"},
    "completep-o-sigma": {**_COMPLETEP, "sigma_reparam": True, "factorised_projections": ("k", "o")},
    "completep-qk-norm": {**_COMPLETEP, "qk_norm": True, "sigma_reparam": True},
    "qk-norm": {"qk_norm": True},
    "all": {"qk_norm": True, "sigma_reparam": True, "layer_norm_scaling": True, "embedding_scale": "sqrt_width"},
}
ONLY_MLRA = ("qk-norm", "completep-qk-norm", "all")
"""Those that stock GPT-2 cannot express."""


def model_config(variant: str = "mlra") -> ModelConfig:
    """A model for the test tokenizer, with padded vocabulary rows."""
    size = tokenizer().vocabulary_size
    values = {"vocab_padding_multiple": 64, "max_positions": 32, "num_layers": 3, "hidden_size": 32, "num_heads": 4}
    model = ModelConfig.model_validate({"vocab_size": size, "init_std": 0.15, **values, **VARIANTS[variant]})
    assert model.padded_vocab_size > model.vocab_size
    return model


@cache
def weights(variant: str = "mlra") -> dict[str, torch.Tensor]:
    """Weights by canonical name; nothing is zero or one by chance. Padded rows are filled, so that a leak shows."""
    found = canonical_weights(model_config(variant))
    found["embedding.weight"][model_config(variant).vocab_size :] = 9.0
    return found


def checkpoint(folder: Path, variant: str = "mlra", has_tokenizer: bool = True) -> Store:
    """Writes a checkpoint of them."""
    source = None
    if has_tokenizer:
        source = folder.parent / f"{folder.name}-tokenizer"
        save_tokenizer(tokenizer(), source)
    values = model_config(variant).model_dump(mode="json")
    buffers = {f"power_iteration/{name}": vector for name, vector in vectors(variant).items()}
    return Store.open(write_weights(folder, values, weights(variant).items(), source, {"source": "a test"}, buffers))


def vectors(variant: str) -> dict[str, torch.Tensor]:
    """Where the power iterations of a variant stand; there are none without sigmaReparam."""
    return initial_vectors(model_config(variant), seed=3)


def random_text(length: int = 32, count: int = 3) -> VerificationText:
    """Tokens [count, length + 1]."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(tokenizer().vocabulary_size, (count, length + 1), generator=generator)
    return VerificationText(tokens, "random tokens")
