"""The tensors of an export: their names and shapes in each format, how each is made from a store, and their files.

`gpt2` is the layout of GPT2LMHeadModel: factorised projections are merged (exactly, since nothing stands between the
factors; in float64, so that only the rounding to the written type remains), q, k and v share one matrix, and matrices
are transposed, since GPT-2's Conv1D keeps them as [in, out]. `mlra` keeps names, factors and all values as they are.

In both the rows that pad the vocabulary are left out, and the output head is the token embedding, stored once. With
`model.embedding_scale` that holds for `mlra` only: GPT-2 has no factor between the two, so there the scaled embedding
and the head are two matrices. Options that a plain model does not have are folded into the weights:

    sigmaReparam:       the matrix, or the up factor, times gamma / sigma; the gains are left out
    LayerNorm Scaling:  weights and biases of the norms of block l times 1/sqrt(l)
    CompleteP:          weight (or up factor) and bias of o, weight and bias of fc_out, times L0 / L

Folded weights are float64, all others are as they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from mlra_scale.checkpoint.files import CheckpointError, FileEntry, some_of, write_file
from mlra_scale.checkpoint.huggingface.gpt2_weights import Gpt2Tensor, gpt2_tensors
from mlra_scale.checkpoint.safetensors_file import write_safetensors
from mlra_scale.model.spectral import iterate

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store
    from mlra_scale.config import ModelConfig

Format = Literal["gpt2", "mlra"]
FORMATS: tuple[Format, ...] = ("gpt2", "mlra")
_INDEX = "model.safetensors.index.json"


class PlainWeights:
    """The weights of a stored model by canonical name, options folded in; each is made when it is asked for.

    Attributes:
        names: Those that a plain model has, in the order of the model.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._vectors = store.buffers()
        self.names = [name for name in store.table if not name.endswith(".gain")]

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor, factor = self._store.tensor(name), self._factor(name)
        if entry := self._store.table.normalised.get(name):
            weights = [self._store.tensor(info.name).double() for info in entry.weights]
            # That of the run's next step or validation.
            sigma = iterate(entry, self._vectors[entry.vector].double(), weights).sigma
            tensor = weights[-1] * (self._store.tensor(entry.gain).double() / sigma)
        return tensor if factor == 1.0 else tensor.double() * factor

    def _factor(self, name: str) -> float:
        """What LayerNorm Scaling and CompleteP multiply a parameter by."""
        model, (room, *parts) = self._store.model, name.split(".")
        if room != "blocks":
            return 1.0
        block, owner = int(parts[0]), ".".join(parts[1:-1])
        if owner in ("attention_norm", "mlp_norm"):
            return model.norm_factor(block)
        # The maps that end a branch; their bias comes after their gain and is multiplied by this factor only.
        return model.branch_factor if owner in ("attention.o", "attention.o.up", "mlp.fc_out") else 1.0

    def merged(self, name: str) -> torch.Tensor:
        """Returns a parameter of the dense model; the factors of a factorised matrix are multiplied in float64."""
        values = [self[part] for part in self.parts(name)]
        return values[0] if len(values) == 1 else values[0].double() @ values[1].double()

    def parts(self, name: str) -> list[str]:
        """Returns the parameters of this model that are a parameter of the dense one: itself, or its factors."""
        if name in self._store.table:
            return [name]
        prefix, _, kind = name.rpartition(".")
        return [f"{prefix}.up.bias"] if kind == "bias" else [f"{prefix}.up.weight", f"{prefix}.down.weight"]


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write: name and shape in the exported files, and what makes it, in its most accurate type."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def check_expressible(model: ModelConfig, export_format: Format) -> None:
    """Raises CheckpointError if a format cannot express a model."""
    if export_format == "gpt2" and model.qk_norm:
        raise CheckpointError(
            "the model normalises queries and keys (model.qk_norm), which stock GPT-2 cannot: what a norm divides by "
            "depends on the text, so no weight can include it; use --format mlra"
        )


def export_tensors(store: Store, export_format: Format) -> list[ExportTensor]:
    """Returns the tensors of an export, in the order of the model; none is made yet.

    Raises:
        CheckpointError: The model has parameters that the format would leave out.
    """
    plain = PlainWeights(store)
    known = {part for tensor in gpt2_tensors(store.model) for name in tensor.parameters for part in plain.parts(name)}
    if export_format == "mlra":
        known |= {name for name in plain.names if name.endswith((".q_norm.weight", ".k_norm.weight"))}
    if unknown := [name for name in plain.names if name not in known]:
        raise CheckpointError(
            f"the format {export_format} has no place for {some_of(unknown)}: an export would be another model; "
            "checkpoint/huggingface/tensors.py has to fold or refuse the option that they belong to"
        )
    return list(_gpt2(store, plain) if export_format == "gpt2" else _mlra(store, plain))


def _mlra(store: Store, plain: PlainWeights) -> Iterator[ExportTensor]:
    for name in plain.names:
        if name == "embedding.weight":
            yield _vocabulary(store, f"model.{name}")
        else:
            yield ExportTensor(f"model.{name}", store.table[name].shape, partial(plain.__getitem__, name))


def _gpt2(store: Store, plain: PlainWeights) -> Iterator[ExportTensor]:
    factor = store.model.embedding_factor
    for tensor in gpt2_tensors(store.model):
        name = f"transformer.{tensor.name}"
        if tensor.parameters == ("embedding.weight",):
            yield _vocabulary(store, name, factor)
        else:
            yield ExportTensor(name, tensor.shape, partial(_joined, plain, tensor))
    if factor != 1.0:
        yield _vocabulary(store, "lm_head.weight")


def _vocabulary(store: Store, target: str, factor: float = 1.0) -> ExportTensor:
    """The embedding without the rows that pad it."""
    tokens, width = store.model.vocab_size, store.model.hidden_size

    def make() -> torch.Tensor:
        rows = store.rows("embedding.weight", 0, tokens)
        return rows if factor == 1.0 else rows.double() * factor

    return ExportTensor(target, (tokens, width), make)


def _joined(plain: PlainWeights, tensor: Gpt2Tensor) -> torch.Tensor:
    values = torch.cat([plain.merged(name) for name in tensor.parameters])
    return values.T if tensor.is_transposed else values


def write_shards(
    folder: Path, tensors: Sequence[ExportTensor], dtype: torch.dtype, max_bytes: int
) -> dict[str, FileEntry]:
    """Writes the tensors into one safetensors file, or several with an index; one tensor is in memory at a time.

    A file has at most `max_bytes` bytes of tensors, unless a single one is larger.

    Returns:
        Size and checksum of every file with tensors, by name, and of the index.

    Raises:
        OSError: A file cannot be written.
        CheckpointError: The type cannot represent a weight.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    sizes = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in by_name.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_bytes)
    files: dict[str, FileEntry] = {}
    for file, names in split.filename_to_tensors.items():
        specs = {name: (dtype, by_name[name].shape) for name in names}
        made = ((name, _convert(by_name[name], dtype)) for name in names)
        # transformers refuses files that do not say which library their tensors are for.
        files[file] = write_safetensors(folder / file, specs, made, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files[_INDEX] = write_file(folder / _INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return files


def _convert(tensor: ExportTensor, dtype: torch.dtype) -> torch.Tensor:
    """Makes a tensor in the written type. No text uses every weight, so the verification could miss an infinite one."""
    values = tensor.make()
    written = values.to(dtype)
    if dtype.itemsize < 4:
        limits, largest = torch.stack(written.aminmax()), torch.finfo(dtype).max
        if limits.isinf().any() and not torch.stack(values.aminmax()).isinf().any():
            raise CheckpointError(f"{tensor.name} has values beyond {largest:g}, where {dtype} ends; use another type")
    return written
