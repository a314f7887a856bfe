"""The weights of GPT2LMHeadModel: how they correspond to ours, and reading them from a Hugging Face folder."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.config import ModelConfig
from mlra_scale.config.json_text import printable
from mlra_scale.config.weight_map import weight_map

OUTSIDE_BLOCKS = {
    "wte.weight": "embedding.weight",
    "wpe.weight": "positions.weight",
    "ln_f.weight": "final_norm.weight",
    "ln_f.bias": "final_norm.bias",
}
NORMS = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}
LINEAR_MAPS = {
    "attn.c_attn": ("attention.q", "attention.k", "attention.v"),
    "attn.c_proj": ("attention.o",),
    "mlp.c_fc": ("mlp.fc_in",),
    "mlp.c_proj": ("mlp.fc_out",),
}
"""Modules of a GPT-2 block, with ours. GPT-2 keeps matrices as [in, out], and the outputs of q, k, v side by side."""
BLOCK_ORDER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")

# Masks that old versions of transformers stored as if they were weights.
_OLD_BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_HEAD = "lm_head.weight"
_SOME = 6


def linear_shape(model: ModelConfig, module: str) -> tuple[int, int]:
    """Returns the shape [in, out] of one of LINEAR_MAPS."""
    D, F = model.hidden_size, model.ffn_size
    return {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}[module]


def gpt2_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every weight of GPT2Model with the sizes of a model."""
    D = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (model.vocab_size, D), "wpe.weight": (model.max_positions, D)}
    for block in range(model.num_layers):
        for module in BLOCK_ORDER:
            shape = (D,) if module in NORMS else linear_shape(model, module)
            shapes |= {f"h.{block}.{module}.weight": shape, f"h.{block}.{module}.bias": shape[-1:]}
    return shapes | {"ln_f.weight": (D,), "ln_f.bias": (D,)}


def read_gpt2_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Maps the weights of a folder, by their names in GPT2Model, and the head where one is stored.

    Args:
        folder: With model.safetensors or pytorch_model.bin, either also in shards with an index.

    Raises:
        CheckpointError: A file is missing, damaged, or holds other things than tensors.
    """
    for index, read in (("model.safetensors.index.json", _safetensors), ("pytorch_model.bin.index.json", _pickled)):
        single = folder / index.removesuffix(".index.json")
        found: dict[str, torch.Tensor] = {}
        if (folder / index).is_file():
            try:
                files = weight_map(folder / index)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            for file in sorted(set(files.values())):
                if not (folder / file).is_file():
                    raise CheckpointError(f"{folder / file} is missing, although {index} names it")
                found |= read(folder / file)
            if lost := sorted(files.keys() - found.keys()):
                raise CheckpointError(f"{folder / index} names tensors that no file has: {_some(lost)}")
        elif single.is_file():
            found = read(single)
        else:
            continue
        weights = {name: tensor for name, tensor in found.items() if not _OLD_BUFFERS.fullmatch(name)}
        return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin, in one file or in shards")


def check_gpt2_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], is_tied: bool
) -> None:
    """Compares the weights of a folder with those that its configuration asks for.

    Args:
        folder: For errors.
        weights: From `read_gpt2_weights`.
        shapes: From `gpt2_shapes`.
        is_tied: Whether config.json says that the head is the token embedding.

    Raises:
        CheckpointError: Names weights that are missing, unknown, of another shape or quantized; or the head is another
            matrix than the token embedding.
    """
    faults = []
    if missing := sorted(shapes.keys() - weights.keys()):
        faults.append(f"lacks {_some(missing)}")
    if unknown := sorted(weights.keys() - shapes.keys() - {_HEAD}):
        faults.append(f"has weights that this project's GPT-2 does not have: {_some(unknown)}")
    for name in sorted(shapes.keys() & weights.keys()):
        if tuple(weights[name].shape) != shapes[name]:
            faults.append(f"has {name} {tuple(weights[name].shape)}, config.json makes it {shapes[name]}")
        elif not weights[name].is_floating_point():
            faults.append(f"has {name} as {weights[name].dtype}; save the model unquantized")
    if faults:
        more = f"; and {len(faults) - _SOME} more" if len(faults) > _SOME else ""
        raise CheckpointError(f"{folder} " + "; it ".join(faults[:_SOME]) + more)
    if _HEAD not in weights:
        if not is_tied:
            raise CheckpointError(f"{folder}: config.json says tie_word_embeddings false, and {_HEAD} is missing")
    elif not torch.equal(weights[_HEAD], weights["wte.weight"]):
        raise CheckpointError(
            f"{folder} has a head of its own ({_HEAD} is not wte.weight); here the head is the token embedding"
        )


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {printable(str(error), 300)}") from error


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save; no code in it is run."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as tensors and nothing else: {printable(reason, 300)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is not a table of tensors; save the model with save_pretrained")
    return content


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SOME} more" if len(names) > _SOME else ""
    return printable(", ".join(names[:_SOME])) + more
