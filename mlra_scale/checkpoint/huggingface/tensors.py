"""What an export consists of: the tensors of each format, by name, and how each is made from a store.

`gpt2` is the layout of GPT2LMHeadModel: factorised projections are merged (exactly, since nothing stands between the
factors; in float64, so that only the rounding to the written type remains), q, k and v share one matrix, and matrices
are transposed, since GPT-2's Conv1D keeps them as [in, out]. `mlra` keeps names, factors and all values as they are.

In both the rows that pad the vocabulary are left out, and the output head is the token embedding, stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store

Format = Literal["gpt2", "mlra"]
FORMATS: tuple[Format, ...] = ("gpt2", "mlra")


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write.

    Attributes:
        name: Its name in the exported files.
        shape: Its shape there.
        make: Returns it, in the most accurate type there is; called when its turn to be written has come.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def export_tensors(store: Store, export_format: Format) -> list[ExportTensor]:
    """Returns the tensors of an export, in the order of the model; none is made yet.

    Args:
        store: An open checkpoint.
        export_format: One of FORMATS.
    """
    return list(_gpt2(store) if export_format == "gpt2" else _mlra(store))


def _mlra(store: Store) -> Iterator[ExportTensor]:
    for name, info in store.table.items():
        if name == "embedding.weight":
            yield _vocabulary(store, f"model.{name}")
        else:
            yield _as_stored(store, name, f"model.{name}", info.shape)


def _gpt2(store: Store) -> Iterator[ExportTensor]:
    model = store.model
    D, F = model.hidden_size, model.ffn_size
    yield _vocabulary(store, "transformer.wte.weight")
    yield _as_stored(store, "positions.weight", "transformer.wpe.weight", (model.max_positions, D))
    for index in range(model.num_layers):
        source, target = f"blocks.{index}", f"transformer.h.{index}"
        qkv = tuple(f"{source}.attention.{projection}" for projection in ("q", "k", "v"))
        yield from _norm(store, f"{source}.attention_norm", f"{target}.ln_1")
        yield from _linear(store, qkv, f"{target}.attn.c_attn", D, 3 * D)
        yield from _linear(store, (f"{source}.attention.o",), f"{target}.attn.c_proj", D, D)
        yield from _norm(store, f"{source}.mlp_norm", f"{target}.ln_2")
        yield from _linear(store, (f"{source}.mlp.fc_in",), f"{target}.mlp.c_fc", D, F)
        yield from _linear(store, (f"{source}.mlp.fc_out",), f"{target}.mlp.c_proj", F, D)
    yield from _norm(store, "final_norm", "transformer.ln_f")


def _vocabulary(store: Store, target: str) -> ExportTensor:
    """The embedding without the rows that pad it."""
    tokens, width = store.model.vocab_size, store.model.hidden_size
    return ExportTensor(target, (tokens, width), lambda: store.rows("embedding.weight", 0, tokens))


def _as_stored(store: Store, source: str, target: str, shape: tuple[int, ...]) -> ExportTensor:
    return ExportTensor(target, shape, lambda: store.tensor(source))


def _norm(store: Store, source: str, target: str) -> Iterator[ExportTensor]:
    for kind in ("weight", "bias"):
        yield _as_stored(store, f"{source}.{kind}", f"{target}.{kind}", (store.model.hidden_size,))


def _linear(store: Store, sources: tuple[str, ...], target: str, inputs: int, outputs: int) -> Iterator[ExportTensor]:
    """One Conv1D for one or several of our maps side by side."""
    yield ExportTensor(
        f"{target}.weight", (inputs, outputs), lambda: torch.cat([_dense(store, name) for name in sources]).T
    )
    yield ExportTensor(f"{target}.bias", (outputs,), lambda: torch.cat([_bias(store, name) for name in sources]))


def _dense(store: Store, name: str) -> torch.Tensor:
    """The matrix [out, in] of a linear map that may be factorised."""
    if f"{name}.weight" in store.table:
        return store.tensor(f"{name}.weight")
    return store.tensor(f"{name}.up.weight").double() @ store.tensor(f"{name}.down.weight").double()


def _bias(store: Store, name: str) -> torch.Tensor:
    return store.tensor(f"{name}.bias" if f"{name}.bias" in store.table else f"{name}.up.bias")
