"""Importing a GPT-2 folder in Hugging Face's format as a checkpoint: dense as it is, or factorised.

    c_attn.weight [D, 3 D]   its columns are q, k, v; stored [in, out], here [out, in]
    factorised at rank R     W = U S V^T;  up = U sqrt(S) [D, R],  down = sqrt(S) V^T [R, D], the first R of each

That product is the nearest of its rank to W (`factorise`); that both factors have the same singular values is ours to
choose, and gives them gradients of one size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlra_scale.checkpoint.files import CheckpointError, first_line
from mlra_scale.checkpoint.huggingface.gpt2_weights import check_gpt2_weights, gpt2_tensors, read_gpt2_weights
from mlra_scale.checkpoint.state_contents import parse_model
from mlra_scale.checkpoint.weights import write_weights
from mlra_scale.config import ModelConfig
from mlra_scale.config.json_text import printable, read_json_object
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.shipped.low_rank_linear import factorise

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
)
_GELU = ("gelu_new", "gelu_pytorch_tanh")
# What a configuration may say beyond shapes, and what only one value of each means here.
_WANTED: dict[str, tuple[Any, str]] = {
    "scale_attn_weights": (True, "attention here divides by the square root of the head's width"),
    "scale_attn_by_inverse_layer_idx": (False, "attention here does not divide by the layer's number"),
    "add_cross_attention": (False, "there is no encoder here to attend to"),
    "quantization_config": (None, "save the model unquantized"),
}


class KeptEnergy(NamedTuple):
    """What the factorisation of a projection kept: its share of the sum of squared singular values, 0 to 1."""

    block: int
    projection: str
    energy: float


@dataclass(frozen=True)
class Imported:
    """An imported model: the folder of its checkpoint and its model section.

    Attributes:
        stored_dtypes: The types that the weights had in the folder; in the checkpoint they are fp32.
        has_tokenizer: Whether the folder had a tokenizer, which was copied.
        kept: One entry for each factorised projection.
        notes: What the user should know.
    """

    checkpoint: Path
    model: ModelConfig
    stored_dtypes: list[str]
    has_tokenizer: bool
    kept: list[KeptEnergy]
    notes: list[str]


def import_gpt2(
    folder: Path,
    checkpoint: Path,
    rank: int | None = None,
    projections: tuple[str, ...] = ("q", "k", "v"),
    vocab_padding_multiple: int = 128,
) -> Imported:
    """Writes a GPT-2 as a checkpoint of kind "weights", tensor by tensor from mapped files.

    Args:
        folder: With config.json and the weights of a GPT2LMHeadModel.
        checkpoint: The checkpoint to make; it appears when it is complete.
        rank: R of the factorised projections; None: all stay dense and no weight changes.
        projections: Which to factorise.
        vocab_padding_multiple: The embedding's rows are padded with zeros to a multiple of this.

    Raises:
        CheckpointError: The folder is no GPT-2 that this project can express exactly, or nothing can be written.
    """
    config, model, notes = _read_config(folder, rank, projections, vocab_padding_multiple)
    weights = read_gpt2_weights(folder)
    check_gpt2_weights(folder, weights, model, config.tie_word_embeddings)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    origin = {"format": "gpt2", "folder": str(folder), "attention_rank": rank, "dtypes": dtypes}
    kept: list[KeptEnergy] = []
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = _copy_tokenizer(folder, Path(temporary))
        values = model.model_dump(mode="json")
        write_weights(checkpoint, values, _parameters(model, weights, kept), tokenizer, origin)
    return Imported(checkpoint, model, dtypes, tokenizer is not None, kept, notes)


def _read_config(
    folder: Path, rank: int | None, projections: tuple[str, ...], vocab_padding_multiple: int
) -> tuple[Any, ModelConfig, list[str]]:
    """Returns config.json as transformers reads it, our model section, and notes; refuses what we do not have."""
    path = folder / "config.json"
    config = _gpt2_config(path)
    faults = [
        f"{name} is {json.dumps(getattr(config, name, None))}: {reason}"
        for name, (wanted, reason) in _WANTED.items()
        if getattr(config, name, wanted) != wanted
    ]
    if config.activation_function not in _GELU:
        faults.append(f"activation_function is {config.activation_function!a}: here it is {' or '.join(_GELU)}")
    if config.n_embd % config.n_head:
        faults.append(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
    if rank is not None and not 1 <= rank <= config.n_embd:
        faults.append(f"a rank of {rank} does not fit its width; use 1 to {config.n_embd}")
    if faults:
        raise CheckpointError(f"{path}: " + "; ".join(faults))
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "vocab_padding_multiple": vocab_padding_multiple,
        "max_positions": config.n_positions,
        "num_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "num_heads": config.n_head,
        "ffn_hidden_size": config.n_inner,
        "attention": "dense" if rank is None else "mlra",
        "init_std": config.initializer_range,
        "layer_norm_eps": config.layer_norm_epsilon,
        "embedding_dropout": float(config.embd_pdrop),
        "attention_dropout": float(config.attn_pdrop),
        "residual_dropout": float(config.resid_pdrop),
    }
    if rank is not None:
        values |= {"attention_rank": rank, "factorised_projections": list(projections)}
    notes = []
    if any((config.embd_pdrop, config.attn_pdrop, config.resid_pdrop)):
        notes.append("dropout is that of config.json; change it with model.attention_dropout=0 and so on when training")
    if config.reorder_and_upcast_attn:
        notes.append("reorder_and_upcast_attn is dropped: it changes nothing in fp32, and the rounding in 16 bits")
    return config, parse_model(values, path), notes


def _gpt2_config(path: Path) -> Any:
    from transformers import GPT2Config

    if not path.is_file():
        raise CheckpointError(f"{printable(str(path))} does not exist; name a folder in Hugging Face's format")
    try:
        values = read_json_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if values.get("model_type") != GPT2Config.model_type:
        raise CheckpointError(f"{path}: model_type is {values.get('model_type')!a}; only gpt2 can be imported")
    try:
        config = GPT2Config.from_dict(values)
    except Exception as error:  # the library's checks have errors of their own kinds
        raise CheckpointError(f"{path} is not sound: {first_line(error)}") from error
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{path}: {name} is {value!a}; it must be a whole number from 1 on")
    return config


def _parameters(
    model: ModelConfig, weights: Mapping[str, torch.Tensor], kept: list[KeptEnergy]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every parameter in the order of the table, and adds to `kept` what each factorisation keeps."""
    table = ParameterTable(model)
    sources = {name: (tensor, i) for tensor in gpt2_tensors(model) for i, name in enumerate(tensor.parameters)}

    def dense(name: str) -> torch.Tensor:
        tensor, number = sources[name]
        values = weights[tensor.name]
        if len(tensor.parameters) > 1:  # q, k and v side by side
            values = values.split(model.hidden_size, dim=-1)[number]
        return values.T if tensor.is_transposed else values

    factors: dict[str, torch.Tensor] = {}
    for name in table:
        if name in factors:
            yield name, factors.pop(name)
        elif name.endswith(".down.weight"):
            projection = name.removesuffix(".down.weight")
            whole = _finite(name, dense(f"{projection}.weight"))
            factors[f"{projection}.up.weight"], down, energy = factorise(whole, model.rank)
            _, block, _, letter = projection.split(".")
            kept.append(KeptEnergy(int(block), letter, energy))
            yield name, down
        else:
            tensor = _finite(name, dense(name.replace(".up.bias", ".bias")))
            if name == "embedding.weight":
                padding = table[name].shape[0] - len(tensor)
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding)) if padding else tensor
            yield name, tensor


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not all(bool(torch.isfinite(rows).all()) for rows in tensor.split(4096)):
        raise CheckpointError(f"{name} has values that are not finite numbers; the model is damaged")
    return tensor


def _copy_tokenizer(folder: Path, target: Path) -> Path | None:
    """Copies the tokenizer's files, which lie among others; None where there are none."""
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    return target if any(target.iterdir()) else None
