"""Checkpoints for tests, of a tiny model and of any layout, without an engine."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mlra_scale.config import ModelConfig
from mlra_scale.model.parameters import ParameterTable

MODEL = ModelConfig(vocab_size=21, vocab_padding_multiple=4, max_positions=6, num_layers=1, hidden_size=8, num_heads=2)


def global_values(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, torch.Tensor]:
    """A value for every element of the model; padded rows of the embedding are zero."""
    generator = np.random.default_rng(seed)
    values = {
        name: torch.from_numpy(generator.standard_normal(info.shape, dtype=np.float32))
        for name, info in ParameterTable(model).items()
    }
    values["embedding.weight"][model.vocab_size :] = 0.0
    return values


def write_tokenizer(folder: Path) -> Path:
    """Something that looks like a tokenizer's folder."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text('{"model": {}}\n')
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


def in_order(values: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The values one by one."""
    yield from values.items()
