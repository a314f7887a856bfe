"""The weights of a GPT-2 folder in Hugging Face's format, mapped from its files and checked to be all there."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.config.json_text import printable
from mlra_scale.config.weight_map import weight_map

# Masks that old versions of transformers stored as if they were weights.
_OLD_BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_HEAD = "lm_head.weight"
_SOME = 6


class GPT2Weights:
    """The tensors of a folder by their names in GPT2Model, without the prefix that GPT2LMHeadModel puts before them.

    Args:
        folder: With model.safetensors or pytorch_model.bin, either also in shards with an index.

    Attributes:
        names: The names.

    Raises:
        CheckpointError: A file is missing, damaged, or holds other things than tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = {
            name.removeprefix("transformer."): tensor
            for name, tensor in _tensors(folder).items()
            if not _OLD_BUFFERS.fullmatch(name)
        }
        self.names = frozenset(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    @property
    def dtypes(self) -> list[str]:
        """The types of the weights."""
        return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self._tensors.values()})

    def check(self, shapes: Mapping[str, tuple[int, ...]], is_tied: bool) -> None:
        """Compares what is there with what has to be there.

        Args:
            shapes: Name and shape of every weight.
            is_tied: Whether config.json says that the head is the token embedding.

        Raises:
            CheckpointError: Naming weights that are missing, unknown, of another shape, or not finite numbers; or a
                head of its own.
        """
        faults = []
        if missing := sorted(shapes.keys() - self.names):
            faults.append(f"lacks {_some(missing)}")
        if unknown := sorted(self.names - shapes.keys() - {_HEAD}):
            faults.append(f"has weights that this project's GPT-2 does not have: {_some(unknown)}")
        for name in sorted(shapes.keys() & self.names):
            if tuple(self[name].shape) != shapes[name]:
                faults.append(f"has {name} {tuple(self[name].shape)}, config.json makes it {shapes[name]}")
            elif not self[name].is_floating_point():
                faults.append(f"has {name} as {self[name].dtype}; save the model unquantized")
        if faults:
            more = f"; and {len(faults) - _SOME} more" if len(faults) > _SOME else ""
            raise CheckpointError(f"{self.folder} " + "; it ".join(faults[:_SOME]) + more)
        if _HEAD not in self.names:
            if not is_tied:
                raise CheckpointError(
                    f"{self.folder}: config.json says tie_word_embeddings false, and {_HEAD} is missing"
                )
        elif self[_HEAD].shape != self["wte.weight"].shape or not torch.equal(self[_HEAD], self["wte.weight"]):
            raise CheckpointError(
                f"{self.folder} has a head of its own ({_HEAD} is not wte.weight); here the head is the token embedding"
            )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, mapped from its file."""
    for index, read in (("model.safetensors.index.json", _safetensors), ("pytorch_model.bin.index.json", _pickled)):
        single = folder / index.removesuffix(".index.json")
        if (folder / index).is_file():
            found: dict[str, torch.Tensor] = {}
            files = _weight_map(folder / index)
            for file in sorted(set(files.values())):
                if not (folder / file).is_file():
                    raise CheckpointError(f"{folder / file} is missing, although {index} names it")
                found |= read(folder / file)
            if lost := sorted(files.keys() - found.keys()):
                raise CheckpointError(f"{folder / index} names tensors that no file has: {_some(lost)}")
            return found
        if single.is_file():
            return read(single)
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin, in one file or in shards")


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        mapped = safe_open(path, framework="pt")
        return {name: mapped.get_tensor(name) for name in mapped.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {printable(str(error), 300)}") from error


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save; nothing in it is run."""
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


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return weight_map(index)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SOME} more" if len(names) > _SOME else ""
    return printable(", ".join(names[:_SOME])) + more
