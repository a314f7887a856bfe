"""The weights of GPT2LMHeadModel: how they correspond to ours, and reading them from a Hugging Face folder."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlra_scale.checkpoint.files import CheckpointError, first_line, some_of
from mlra_scale.config import ModelConfig
from mlra_scale.config.weight_map import weight_map

# Masks that old versions of transformers stored as if they were weights.
_OLD_BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_HEAD = "lm_head.weight"
_SOME = 6


@dataclass(frozen=True)
class Gpt2Tensor:
    """A weight of GPT2Model, and which parameters of a dense model of ours it holds.

    Attributes:
        name: In GPT2Model.
        shape: There. Matrices of linear maps are [in, out], where ours are [out, in].
        parameters: One; or those of q, k and v, whose outputs GPT-2 keeps side by side.
        is_transposed: Whether it is such a matrix.
    """

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    is_transposed: bool = False


def gpt2_tensors(model: ModelConfig) -> Iterator[Gpt2Tensor]:
    """Yields every weight of GPT2Model with the sizes of a model, in the order of the model."""
    D, F = model.hidden_size, model.ffn_size
    yield Gpt2Tensor("wte.weight", (model.vocab_size, D), ("embedding.weight",))
    yield Gpt2Tensor("wpe.weight", (model.max_positions, D), ("positions.weight",))
    for block in range(model.num_layers):
        for module, ours, shape in (
            ("ln_1", ("attention_norm",), (D,)),
            ("attn.c_attn", ("attention.q", "attention.k", "attention.v"), (D, 3 * D)),
            ("attn.c_proj", ("attention.o",), (D, D)),
            ("ln_2", ("mlp_norm",), (D,)),
            ("mlp.c_fc", ("mlp.fc_in",), (D, F)),
            ("mlp.c_proj", ("mlp.fc_out",), (F, D)),
        ):
            weights, biases = (tuple(f"blocks.{block}.{name}.{kind}" for name in ours) for kind in ("weight", "bias"))
            yield Gpt2Tensor(f"h.{block}.{module}.weight", shape, weights, is_transposed=len(shape) == 2)
            yield Gpt2Tensor(f"h.{block}.{module}.bias", shape[-1:], biases)
    for kind in ("weight", "bias"):
        yield Gpt2Tensor(f"ln_f.{kind}", (D,), (f"final_norm.{kind}",))


def read_gpt2_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Maps the weights of a folder, by their names in GPT2Model, and the head where one is stored.

    They are in model.safetensors or pytorch_model.bin, either also in shards with an index.

    Raises:
        CheckpointError: A file is missing, damaged, or holds other things than tensors.
    """
    for name, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickled)):
        index = folder / f"{name}.index.json"
        found: dict[str, torch.Tensor] = {}
        if index.is_file():
            try:
                files = weight_map(index)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            for file in sorted(set(files.values())):
                if not (folder / file).is_file():
                    raise CheckpointError(f"{folder / file} is missing, although {index.name} names it")
                found |= read(folder / file)
            if lost := sorted(files.keys() - found.keys()):
                raise CheckpointError(f"{index} names tensors that no file has: {some_of(lost)}")
        elif (folder / name).is_file():
            found = read(folder / name)
        else:
            continue
        weights = {name: tensor for name, tensor in found.items() if not _OLD_BUFFERS.fullmatch(name)}
        return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin, in one file or in shards")


def check_gpt2_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], model: ModelConfig, has_tied_head: bool
) -> None:
    """Compares the weights of a folder with those that its configuration asks for.

    Raises:
        CheckpointError: Names weights that are missing, unknown, of another shape or quantized; or the head is another
            matrix than the token embedding.
    """
    shapes = {tensor.name: tensor.shape for tensor in gpt2_tensors(model)}
    faults = []
    if missing := sorted(shapes.keys() - weights.keys()):
        faults.append(f"lacks {some_of(missing)}")
    if unknown := sorted(weights.keys() - shapes.keys() - {_HEAD}):
        faults.append(f"has weights that this project's GPT-2 does not have: {some_of(unknown)}")
    for name in sorted(shapes.keys() & weights.keys()):
        if tuple(weights[name].shape) != shapes[name]:
            faults.append(f"has {name} {tuple(weights[name].shape)}, config.json makes it {shapes[name]}")
        elif not weights[name].is_floating_point():
            faults.append(f"has {name} as {weights[name].dtype}; save the model unquantized")
    if faults:
        more = f"; and {len(faults) - _SOME} more" if len(faults) > _SOME else ""
        raise CheckpointError(f"{folder} " + "; it ".join(faults[:_SOME]) + more)
    if _HEAD not in weights:
        if not has_tied_head:
            raise CheckpointError(f"{folder}: config.json says tie_word_embeddings false, and {_HEAD} is missing")
    elif not torch.equal(weights[_HEAD], weights["wte.weight"]):
        raise CheckpointError(
            f"{folder} has a head of its own ({_HEAD} is not wte.weight); here the head is the token embedding"
        )


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {first_line(error)}") from error


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save; no code in it is run."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as tensors and nothing else: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is not a table of tensors; save the model with save_pretrained")
    return content
