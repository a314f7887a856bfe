"""TEV of a model in any training loop: plain, DDP, FSDP2 and other DTensors, DeepSpeed ZeRO 0 to 3.

A rank measures what it holds of the embedding and the matrix is not gathered (stability/tev.py). Ranks that hold equal
copies measure them without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlra_scale.stability.embedding_names import input_embeddings
from mlra_scale.stability.tev import (
    DEFAULT_QUANTILES,
    TevStatistics,
    checked_request,
    measure,
    tev_of_matrix,
    tev_values,
)

if TYPE_CHECKING:
    import numpy as np


def tev(
    model_or_matrix: nn.Module | Tensor | np.ndarray,
    *,
    embedding: str | None = None,
    num_tokens: int | None = None,
    quantiles: Sequence[float] = DEFAULT_QUANTILES,
    extremes: int = 0,
) -> TevStatistics:
    """Measures the token embedding variability of a model or a matrix, in fp64.

    Under DeepSpeed's ZeRO the fp32 master weights are measured. Where the ranks of a job hold parts of the embedding,
    as with ZeRO and FSDP2, the call is collective: all of them make it, and all get the same numbers.

    Args:
        model_or_matrix: A model, wrapped or not, or the embedding itself: [rows, D].
        embedding: Name of the embedding in the model, as `named_parameters` has it or its end. None: what
            `get_input_embeddings` returns, else the parameter with one of the usual names, else the only nn.Embedding.
        num_tokens: Number of real tokens; the rows after them are padding. None: all rows, or where no embedding is
            named `config.vocab_size` of a model of transformers, if that is smaller than the number of rows.
        quantiles: Probabilities in [0, 1].
        extremes: How many of the highest and of the lowest tokens to list.

    Returns:
        Mean, standard deviation and quantiles over the tokens, and what else `TevStatistics` lists; the same numbers on
        every rank.

    Raises:
        ValueError: No embedding, or several, were found; or what was found is no matrix of real numbers that this
            function knows how to put together; or an argument is out of its range.
    """
    if not isinstance(model_or_matrix, nn.Module):
        if embedding is not None:
            raise ValueError("embedding names a parameter of a model, and this is a matrix")
        weight = model_or_matrix
        if not isinstance(weight, Tensor):
            return tev_of_matrix(weight, num_tokens, quantiles, extremes)
    else:
        weight = embedding_of(model_or_matrix, embedding)
    held = _held_of(weight)
    if num_tokens is None and embedding is None and isinstance(model_or_matrix, nn.Module):
        num_tokens = _configured_tokens(model_or_matrix, held.shape[0])
    request = checked_request(held.shape, num_tokens, quantiles, extremes)
    return measure(request, held.parts, held.device, held.groups)


def log_values(statistics: TevStatistics) -> dict[str, float]:
    """Returns the numbers of a measurement by the names that the trainer's own loggers use, which take scalars."""
    values = tev_values(statistics)
    quantiles = values.pop("tev_quantiles")
    return {**values, **{f"tev_quantiles/{quantile}": value for quantile, value in quantiles.items()}}


def checked_every(every: int) -> int:
    """Returns the number of steps between measurements.

    Raises:
        ValueError: It is no number of steps.
    """
    if not isinstance(every, int) or every < 0:
        raise ValueError(f"every is {every!r}; use a number of steps, or 0 for no measurement between first and last")
    return every


def embedding_of(model: nn.Module, name: str | None = None) -> Tensor:
    """Returns the weight of a model's token embedding, or of the one with this name; see `tev`.

    Raises:
        ValueError: There is none, or there are several.
    """
    # With duplicates: the first name of a tied matrix may be that of the head.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name is not None:
        endings = (name, f"{name}.weight")
        found = [key for key in parameters if key in endings or key.endswith(tuple(f".{ending}" for ending in endings))]
        if len({id(parameters[key]) for key in found}) != 1:
            raise ValueError(f"{name!r} names {_listed(found)} among the parameters: {_listed(sorted(parameters))}")
        return parameters[found[0]]
    weight = _of_transformers(model)
    if weight is not None:
        return weight
    weights: dict[str, Tensor] = {name: parameters[name] for name in input_embeddings(parameters)} or {
        f"{path}.weight".removeprefix("."): module.weight  # which a parametrization computes
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    if len({id(each) for each in weights.values()}) != 1:
        listed = _listed([*weights])
        raise ValueError(f"which parameter is the token embedding? Name it with embedding=...; found: {listed}")
    return next(iter(weights.values()))


def _of_transformers(model: nn.Module) -> Tensor | None:
    """The embedding that a model of transformers, wrapped by up to a few others, names itself."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        get_input_embeddings: Any = getattr(inner, "get_input_embeddings", None)
        try:
            weight = None if get_input_embeddings is None else getattr(get_input_embeddings(), "weight", None)
        except (AttributeError, NotImplementedError):  # what transformers raises where a model has none
            weight = None
        if isinstance(weight, Tensor):
            return weight
        inner = getattr(inner, "module", None)
    return None


def _listed(names: Sequence[str], count: int = 8) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + more


def _configured_tokens(model: nn.Module, rows: int) -> int | None:
    """The size of the vocabulary by the outermost configuration that has one, if it is smaller than the matrix."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            vocab_size = getattr(config.get_text_config(), "vocab_size", None)
            return vocab_size if type(vocab_size) is int and 0 < vocab_size < rows else None
    return None


@dataclass(frozen=True)
class _Held:
    """What this process holds of a matrix.

    Attributes:
        shape: Of the whole matrix.
        parts: Flat offset in the matrix and 1-D values of each run of elements.
        device: Of what is exchanged.
        groups: Of the ranks that hold the rest; see `measure`.
    """

    shape: tuple[int, ...]
    parts: list[tuple[int, Tensor]]
    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()


def _held_of(weight: Any) -> _Held:
    is_zero3 = hasattr(weight, "ds_id")
    shape = tuple(weight.ds_shape) if is_zero3 else tuple(weight.shape)
    if len(shape) != 2 or not weight.is_floating_point():
        raise ValueError(
            f"an embedding is a matrix of real numbers, not {weight.dtype} {list(shape)} (FSDP 1 keeps parameters in "
            "flat pieces: use fully_shard, or measure inside FSDP.summon_full_params)"
        )
    if getattr(weight, "tensor_model_parallel", False):
        raise ValueError("the embedding is cut by Megatron's tensor parallelism, whose ranks are not known here")
    if is_zero3:
        return _held_in_zero3(weight, shape)
    if hasattr(weight, "_hp_mapping"):
        return _held_in_zero(weight, shape)
    if hasattr(weight, "device_mesh"):
        return _held_in_mesh(weight, shape)
    return _Held(shape, [(0, weight.detach().reshape(-1))], weight.device)


def _held_in_zero3(weight: Any, shape: tuple[int, ...]) -> _Held:
    """DeepSpeed ZeRO 3: data rank r holds elements r s to (r + 1) s of the flattened matrix, the last ones padding."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_local_fp32_param

    # There are no fp32 weights of a parameter that is not trained.
    values = safe_get_local_fp32_param(weight) if hasattr(weight, "_z3_optimizer") else None
    values = weight.ds_tensor if values is None else values
    size, group = weight.ds_tensor.ds_numel, weight.ds_process_group
    start = dist.get_rank(group) * size
    length = max(0, min(size, weight.ds_numel - start))
    device = torch.device(get_accelerator().current_device_name())
    return _Held(shape, [(start, values.detach().view(-1)[:length])], device, (group,))


def _held_in_zero(weight: Any, shape: tuple[int, ...]) -> _Held:
    """DeepSpeed ZeRO 1 and 2: runs of the fp32 weights, split over data ranks; None where a rank has none."""
    mapping = weight._hp_mapping
    values = None if mapping is None else mapping.hp_fragment.detach()
    parts = [] if values is None else [(mapping.lp_fragment_address.start, values)]
    return _Held(shape, parts, weight.device, (weight._dp_group,))


def _held_in_mesh(weight: Any, shape: tuple[int, ...]) -> _Held:
    """FSDP2 and other DTensors: rows. Columns are exchanged for rows first, which moves the matrix once."""
    from torch.distributed.tensor import Replicate, Shard

    weight, mesh = weight.detach(), weight.device_mesh
    if any(placement.is_partial() for placement in weight.placements):
        raise ValueError(f"the embedding is a sum that is still to be formed: its placements are {weight.placements}")
    cut_dims = [getattr(placement, "dim", None) for placement in weight.placements]
    if any(dim not in (None, 0) for dim in cut_dims):
        weight = weight.redistribute(placements=[Replicate() if dim is None else Shard(0) for dim in cut_dims])
    (chunk,) = weight.__create_chunk_list__()
    values = weight.to_local().reshape(-1)
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(mesh.device_type, torch.get_device_module(device).current_device())
    groups = tuple(mesh.get_group(number) for number, dim in enumerate(cut_dims) if dim is not None)
    return _Held(shape, [(chunk.offsets[0] * shape[1], values)], device, groups)
